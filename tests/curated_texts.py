"""Texts in English and Chinese that the quality filters of curation keep."""

from __future__ import annotations

import random

ENGLISH = (
    "the old farmer walked to market and bought bread with money that his brother have given; be careful "
    "of winter rain when you travel across mountains because roads are often covered in snow while young "
    "teacher wrote letter about history library city council decided rebuild bridge river children wanted "
    "play garden house green windows train station morning evening never always slowly finally understood "
    "reason nobody knew people music dinner friend neighbour captain ship harbour island summer"
)
CHINESE = (
    "农民 年轻 老师 城市 市场 面包 兄弟 小心 冬天 下雨 旅行 山上 道路 经常 覆盖 因为 所以 写信 历史 "
    "图书馆 决定 修建 桥梁 河流 孩子 希望 花园 房子 绿色 窗户 火车 早上 晚上 从来 总是 慢慢 终于 理解 "
    "原因 知道 音乐 晚饭 朋友 邻居 船长 港口 岛屿 夏天 我们 他们 学校 学生 电影 天气 非常 喜欢 不过 "
    "已经 时候 国家 问题 工作 生活 发展 社会 经济 文化 科学 技术 医院 医生 健康 食物 水果 颜色 语言 "
    "文章"
)


def document(words: str, seed: int) -> str:
    """Five paragraphs of five sentences; no two seeds share more than a few words in a row."""
    choose, english = random.Random(seed), words is ENGLISH
    sentences = [
        (" " if english else "的").join(choose.choices(words.split(), k=10)) + (". " if english else "。") for _ in range(25)
    ]
    return "\n".join("".join(sentences[i : i + 5]).strip() for i in range(0, 25, 5))
