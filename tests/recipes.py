"""How the recipes save, for runs of some steps: read from the recipes' own files."""

from __future__ import annotations

from pathlib import Path

import yaml

EXAMPLES = Path(__file__).parent.parent / "examples"
SAVING_RECIPES = sorted(
    str(path.relative_to(EXAMPLES))
    for path in EXAMPLES.glob("*/cpt*.yaml")
    if "keep_last" in yaml.safe_load(path.read_text(encoding="utf-8"))["checkpoint"]
)


def saving_as(recipe: str, save_interval: int) -> list[str]:
    """Arguments by which a run saves as a recipe does, but every `save_interval` steps; keep_every keeps as many of them."""
    settings = yaml.safe_load((EXAMPLES / recipe).read_text(encoding="utf-8"))["checkpoint"]
    shorter = settings["save_interval"] / save_interval
    settings["save_interval"] = save_interval
    if "keep_every" in settings:
        settings["keep_every"] = int(settings["keep_every"] / shorter)
    return [f"--checkpoint.{name}={value}" for name, value in settings.items() if name not in ("load", "save")]


def distinct(recipes: list[str]) -> list[str]:
    """One recipe for each way of saving, but for keep_every, which is far away in a run of some steps."""
    ways = {tuple(word for word in saving_as(recipe, 1) if "keep_every" not in word): recipe for recipe in recipes}
    return list(ways.values())
