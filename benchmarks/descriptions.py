"""Two short sentences a class for three tasks of photographs, written once, before anything was measured."""

DESCRIPTIONS: dict[str, dict[str, list[str]]] = {
    "waste": {
        "cardboard": ["a piece of brown corrugated cardboard.", "a flattened cardboard box with folded edges."],
        "glass": ["an empty glass bottle or jar.", "a transparent or green piece of glass that reflects light."],
        "metal": ["a crushed aluminium drink can.", "a shiny tin can or a piece of metal foil."],
        "other trash": ["dirty mixed rubbish such as a wrapper or a used cup.", "a disposable thing thrown away."],
        "paper": ["a crumpled sheet of white paper.", "a page of a newspaper or a magazine with print on it."],
        "plastic": ["an empty plastic bottle with a cap.", "a plastic bag, tub or food container."],
    },
    "coins": {
        "1 cent": ["a very small copper coin with the number 1.", "a one cent euro coin, reddish brown."],
        "2 cents": ["a small copper coin with the number 2.", "a two cent euro coin, reddish brown with a groove."],
        "5 cents": ["a copper coin with the number 5.", "a five cent euro coin, reddish brown."],
        "10 cents": ["a small golden coin with the number 10.", "a ten cent euro coin, yellow with a notched edge."],
        "20 cents": ["a golden coin with the number 20.", "a twenty cent euro coin, yellow with seven notches."],
        "50 cents": ["a large golden coin with the number 50.", "a fifty cent euro coin, yellow with a notched edge."],
        "1 euro": ["a coin with a silver middle and a golden ring.", "a one euro coin with the number 1."],
        "2 euros": ["a coin with a golden middle and a silver ring.", "a large two euro coin with the number 2."],
    },
    "apples-pears": {
        "Anjou pear": ["a short, round green pear.", "an egg-shaped, light green pear with a short neck."],
        "Conference pear": ["a long, slender brown and green pear.", "an elongated pear with russet skin."],
        "Golden Delicious apple": ["a yellow apple.", "a pale yellow green apple with small dots."],
        "Granny Smith apple": ["a bright green apple.", "a shiny, evenly green apple."],
        "Kaiser pear": ["a brown pear with rough skin.", "a large bronze pear with a long neck."],
        "Pink Lady apple": ["a pink apple with some yellow.", "an apple with a pink blush over yellow green skin."],
        "Red Delicious apple": ["a dark red apple.", "a deep red, heart-shaped apple."],
        "Royal Gala apple": ["an apple with red and yellow stripes.", "a small, round orange red striped apple."],
    },
}  # fmt: skip
