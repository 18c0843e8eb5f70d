"""Codes of languages: which there are, and the right one for what people write instead of it."""

from __future__ import annotations

import re

from megatron_cpt.utils.errors import InputError

# Of each two-letter code of ISO 639: its codes of three letters, its English name, and others that it is mistaken for.
_LANGUAGES = (
    "aa aar afar; ab abk abkhazian; ae ave avestan; af afr afrikaans; ak aka akan; am amh amharic; an arg aragonese; ar ara "
    "arabic; as asm assamese; av ava avaric; ay aym aymara; az aze azerbaijani; ba bak bashkir; be bel belarusian; bg bul "
    "bulgarian; bh bihari; bi bis bislama; bm bam bambara; bn ben bengali; bo bod tib tibetan; br bre breton; bs bos "
    "bosnian; ca cat catalan; ce che chechen; ch cha chamorro; co cos corsican; cr cre cree; cs ces cze czech cz; cu chu; "
    "cv chv chuvash; cy cym wel welsh; da dan danish dk; de deu ger german; dv div divehi; dz dzo dzongkha; ee ewe ewe; el "
    "ell gre gr greek; en eng english; eo epo esperanto; es spa spanish castilian; et est estonian; eu eus baq basque; fa "
    "fas per persian farsi; ff ful fulah; fi fin finnish; fj fij fijian; fo fao faroese; fr fra fre french; fy fry; ga gle "
    "irish; gd gla; gl glg galician; gn grn guarani; gu guj gujarati; gv glv manx; ha hau hausa; he heb hebrew iw; hi hin "
    "hindi; ho hmo; hr hrv croatian; ht hat haitian; hu hun hungarian; hy hye arm armenian; hz her herero; ia ina "
    "interlingua; id ind indonesian in; ie ile interlingue; ig ibo igbo; ii iii; ik ipk inupiaq; io ido ido; is isl ice "
    "icelandic; it ita italian; iu iku inuktitut; ja jpn japanese jp; jv jav javanese jw; ka kat geo georgian; kg kon "
    "kongo; ki kik kikuyu; kj kua kuanyama; kk kaz kazakh; kl kal kalaallisut; km khm khmer; kn kan kannada; ko kor korean; "
    "kr kau kanuri; ks kas kashmiri; ku kur kurdish; kv kom komi; kw cor cornish; ky kir kirghiz kyrgyz; la lat latin; lb "
    "ltz luxembourgish; lg lug ganda; li lim limburgan; ln lin lingala; lo lao lao; lt lit lithuanian; lu lub luba-katanga; "
    "lv lav latvian; mg mlg malagasy; mh mah marshallese; mi mri mao maori; mk mkd mac macedonian; ml mal malayalam; mn mon "
    "mongolian; mr mar marathi; ms msa may malay; mt mlt maltese; my mya bur burmese; na nau nauru; nb nob bokmal; nd nde; "
    "ne nep nepali; ng ndo ndonga; nl nld dut dutch flemish; nn nno nynorsk; no nor norwegian; nr nbl; nv nav navajo; ny "
    "nya chichewa; oc oci occitan; oj oji ojibwa; om orm oromo; or ori oriya odia; os oss ossetian; pa pan panjabi punjabi; "
    "pi pli pali; pl pol polish; ps pus pushto pashto; pt por portuguese; qu que quechua; rm roh romansh; rn run rundi; ro "
    "ron rum romanian mo moldavian; ru rus russian; rw kin kinyarwanda; sa san sanskrit; sc srd sardinian; sd snd sindhi; "
    "se sme; sg sag sango; sh hbs serbo-croatian; si sin sinhala sinhalese; sk slk slo slovak; sl slv slovenian; sm smo "
    "samoan; sn sna shona; so som somali; sq sqi alb albanian al; sr srp serbian; ss ssw swati; st sot sesotho; su sun "
    "sundanese; sv swe swedish; sw swa swahili; ta tam tamil; te tel telugu; tg tgk tajik; th tha thai; ti tir tigrinya; tk "
    "tuk turkmen; tl tgl tagalog filipino; tn tsn tswana; to ton tonga; tr tur turkish; ts tso tsonga; tt tat tatar; tw twi "
    "twi; ty tah tahitian; ug uig uighur uyghur; uk ukr ukrainian; ur urd urdu; uz uzb uzbek; ve ven venda; vi vie "
    "vietnamese vn; vo vol; wa wln walloon; wo wol wolof; xh xho xhosa; yi yid yiddish ji; yo yor yoruba; za zha zhuang; zh "
    "zho chi chinese cn mandarin; zu zul zulu "
)
_NAMES = {code: names for code, *names in map(str.split, _LANGUAGES.split(";"))}
ISO_639_1 = frozenset(_NAMES)
RIGHT_CODE = {name: code for code, names in _NAMES.items() for name in names}
_FORM = re.compile(r"([A-Za-z][A-Za-z0-9+#]+)([-_][A-Za-z0-9+#]+)*", re.ASCII)


def check_language(language: str, field: str = "language") -> None:
    """Refuse what is no code of a language, and what has a shorter one, under which other texts of the language are counted.

    A script or country may follow (`zh-Hant`, `cmn_Hani`). Codes of three letters without one of two (`yue`) and names of
    what is no language (`code`) are taken as they are.

    Raises:
        InputError: naming the right code where it is known
    """
    form = _FORM.fullmatch(language)
    base = form[1] if form else ""
    if base in ISO_639_1 or (len(base) > 2 and base.lower() not in RIGHT_CODE):
        return
    code = base.lower() if base.lower() in ISO_639_1 else RIGHT_CODE.get(base.lower())
    if code is not None:
        raise InputError(f"{field} is {language!r}; expected {code}{language[len(base) :]}")
    raise InputError(f"{field} is {language!r}; expected an ISO 639 code, as in zh, or a longer name, as in code")
