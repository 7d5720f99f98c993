"""Writes products.jsonl: five thousand products of a shop, the same ones every time."""

import json
import pathlib
import random

KINDS = {
    "kitchen": ["Pan", "Kettle", "Knife", "Bowl", "Whisk", "Grater", "Teapot", "Mug"],
    "garden": ["Spade", "Hose", "Shears", "Planter", "Rake", "Lantern", "Bench", "Trellis"],
    "office": ["Lamp", "Chair", "Notebook", "Stapler", "Desk mat", "Pen", "Shelf", "Tray"],
    "outdoor": ["Tent", "Rucksack", "Stove", "Flask", "Compass", "Hammock", "Map case", "Rope"],
    "home": ["Rug", "Mirror", "Clock", "Blanket", "Vase", "Candle", "Basket", "Cushion"],
}
MAKES = ["Alder", "Birch", "Cedar", "Elm", "Fir", "Hazel", "Juniper", "Larch", "Maple", "Oak", "Pine", "Rowan", "Willow"]
FORMS = ["small", "large", "folding", "heavy", "light", "classic", "travel", "stacking"]
STUFFS = ["steel", "oak", "bamboo", "wool", "linen", "glass", "brass", "cork", "enamel", "canvas"]


def main() -> None:
    chance = random.Random(20)
    lines = []
    for number in range(1, 5001):
        category = chance.choice(sorted(KINDS))
        kind = chance.choice(KINDS[category])
        form, stuff = chance.choice(FORMS), chance.choice(STUFFS)
        product = {
            "id": number,
            "name": f"{chance.choice(MAKES)} {form} {kind.lower()}",
            "category": category,
            "price_cents": chance.randrange(399, 24_999, 50),
            "stock": chance.randrange(0, 400),
            "weight_grams": chance.randrange(40, 9_000, 5),
            "description": f"A {form} {kind.lower()} of {stuff}, made to be repaired. Ships within {chance.randint(1, 9)} days.",
        }
        lines.append(json.dumps(product, ensure_ascii=False))
    path = pathlib.Path(__file__).with_name("products.jsonl")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
