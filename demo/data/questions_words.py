"""Words of questions and answers: categories, colours, names and phrasings."""

from __future__ import annotations

from typing import Final

CATEGORIES: Final[dict[str, tuple[str, ...]]] = {
    "animal": ("animal",),
    "bird": ("bird",),
    "insect": ("insect", "bug"),
    "creature": ("creature", "monster"),
    "person": ("person", "human"),
    "hand": ("hand",),
    "face": ("face", "smiley"),
    "heart": ("heart",),
    "plant": ("plant",),
    "food": ("food",),
    "drink": ("drink", "beverage"),
    "vehicle": ("vehicle",),
    "vehicle part": ("vehicle part", "part of a vehicle"),
    "building": ("building", "house"),
    "clock": ("clock",),
    "clothing": ("clothing", "clothes"),
    "furniture": ("furniture",),
    "tool": ("tool",),
    "gun": ("gun", "weapon"),
    "book": ("book",),
    "terrain": ("terrain", "ground"),
    "flag": ("flag",),
    "arrow": ("arrow",),
    "symbol": ("symbol", "sign"),
    "musical instrument": ("musical instrument", "instrument"),
}
"""Category -> accepted names; at most two, so that metrics that want three agreeing answers see one."""
MASS: Final = frozenset(("clothing", "food", "furniture", "terrain"))

_SUBGROUPS: Final = {
    "animal": "cat-face monkey-face animal-mammal animal-amphibian animal-reptile animal-marine",
    "bird": "animal-bird",
    "insect": "animal-bug",
    "face": "face-smiling face-affection face-tongue face-hand face-neutral-skeptical face-sleepy face-unwell face-hat "
    "face-glasses face-concerned",
    "heart": "heart",
    "hand": "hand-fingers-open hand-fingers-partial hand-single-finger hand-fingers-closed hands",
    "person": "person person-gesture person-role person-fantasy person-activity person-sport person-resting family",
    "plant": "plant-flower plant-other",
    "food": "food-fruit food-vegetable food-prepared food-asian food-sweet",
    "drink": "drink",
    "building": "place-building place-religious",
    "vehicle": "transport-ground transport-water transport-air",
    "clock": "time",
    "clothing": "clothing",
    "musical instrument": "musical-instrument",
    "tool": "tool",
    "flag": "country-flag subdivision-flag flag",
    "arrow": "arrow",
    "symbol": "av-symbol alphanum keycap math punctuation zodiac religion other-symbol transport-sign warning",
}
SUBGROUPS: Final = {subgroup: kind for kind, names in _SUBGROUPS.items() for subgroup in names.split()}
# fmt: off
NOT_OF_KIND: Final = frozenset((
    "love letter", "station", "bus stop", "motorway", "railway track", "oil drum", "fuel pump", "wheel", "anchor",
    "police car light", "horizontal traffic light", "vertical traffic light", "stop sign", "construction",
    "ring buoy", "parachute", "seat", "mountain cableway", "hourglass done", "hourglass not done", "brick", "rock",
    "wood", "building construction", "kaaba", "map of japan", "bone", "paw prints", "feather", "spider web",
    "microbe", "nest with eggs", "empty nest", "handshake", "baby bottle", "ice", "bone", "coral", "shell", "wing",
    "ribbon", "gem stone", "lipstick", "prayer beads", "selfie", "magnet", "white cane", "link", "chains", "toolbox",
))
# fmt: on
"""Concepts that emojibase files under a kind that their picture does not show."""

LABELS: Final = {
    "pixel_ultica": {
        "creature": "creature", "terrain": "terrain", "furniture": "furniture", "clothing": "clothing",
        "food": "food", "gun": "gun", "book": "book", "tool": "tool", "vehicle part": "vehicle part",
    },
    "stamp_photo": {
        "animal": "animal", "clothing": "clothing", "food": "food", "plant": "plant", "vehicle": "vehicle",
        "person": "person",
    },
}  # fmt: skip
FOLDERS: Final = {
    "animals-mammals": "animal", "animals-birds": "bird", "animals-bugs": "insect", "animals-fish": "animal",
    "animals-reptiles": "animal", "food-beverages": "drink", "food": "food", "plants": "plant",
    "people-clothing": "clothing", "people-smilies": "face", "shapes-arrows": "arrow",
    "signs_and_symbols-flags": "flag", "transportation-vehicles": "vehicle", "transportation-boating": "vehicle",
    "buildings": "building", "tools-handtools": "tool", "tools-hand_tools": "tool",
}  # fmt: skip
"""Prefix of an openclipart file name -> category; the longest applies."""

COLOURS: Final[dict[str, tuple[str, ...]]] = {
    "red": ("red",),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
    "brown": ("brown",),
    "grey": ("grey", "gray"),
    "black": ("black",),
}
_NOUNS: Final = {
    "face": "smiley", "heart": "hearts", "hand": "hands fist", "arrow": "", "button": "", "square": "", "circle": "",
    "star": "", "moon": "", "sun": "", "cloud": "clouds", "flag": "", "clock": "o’clock watch",
    "tree": "trees", "flower": "rose tulip sunflower hibiscus blossom dandelion lily flowers", "leaf": "leaves clover",
    "mushroom": "mushrooms", "bush": "shrub", "cat": "kitten", "dog": "puppy poodle hound bulldog terrier",
    "bear": "panda", "bird": "parrot eagle duck owl penguin dove swan crow gull goose turkey chicken rooster chick",
    "fish": "shark blowfish trout salmon carp catfish perch goldfish", "spider": "", "pig": "boar piglet",
    "horse": "zebra donkey pony unicorn", "cow": "ox buffalo bull calf", "snake": "", "frog": "toad", "mouse": "rat",
    "rabbit": "bunny hare", "bug": "ant beetle fly bee wasp mosquito cockroach cricket ladybug moth",
    "zombie": "zombies", "skull": "", "hat": "cap helmet crown beret fedora",
    "shoe": "shoes sneakers boot boots sandals",
    "shirt": "t-shirt blouse sweater jersey", "coat": "jacket hoodie cloak robe trenchcoat", "dress": "gown skirt",
    "trousers": "pants jeans shorts leggings", "glasses": "sunglasses goggles", "gloves": "glove mittens gauntlets",
    "bag": "backpack purse handbag pouch rucksack briefcase", "box": "crate package chest",
    "book": "novel books manual",
    "bottle": "flask jug", "glass": "cocktail", "cup": "mug", "pot": "pan skillet", "bowl": "dish", "knife": "dagger",
    "sword": "katana machete swords", "hammer": "sledgehammer mallet", "saw": "hacksaw chainsaw", "axe": "hatchet",
    "pen": "pencil crayon", "key": "keys", "umbrella": "", "lamp": "lantern flashlight candle", "camera": "camcorder",
    "phone": "cellphone smartphone telephone", "computer": "laptop", "gun": "pistol rifle shotgun revolver carbine smg",
    "bomb": "grenade", "ball": "baseball basketball softball volleyball football", "drum": "", "guitar": "banjo violin",
    "wall": "walls", "door": "", "window": "windows", "floor": "carpet", "house": "home hut cottage", "bed": "mattress",
    "chair": "stool armchair seat", "table": "desk workbench", "cabinet": "cupboard dresser locker bookcase wardrobe",
    "car": "automobile taxi", "truck": "lorry", "bus": "minibus trolleybus", "train": "locomotive tram metro",
    "boat": "ship sailboat canoe ferry speedboat kayak", "bicycle": "bike motorcycle scooter", "plane": "airplane",
    "wheel": "tire", "rocket": "", "apple": "apples", "egg": "eggs", "bread": "baguette bagel bun toast loaf",
    "cake": "cupcake shortcake pie", "sandwich": "hamburger burger", "meat": "steak bacon jerky sausage",
    "gem": "ruby opal amethyst topaz pearl emerald tourmaline alexandrite sapphire peridot garnet citrine aquamarine "
    "diamond", "medal": "", "balloon": "balloons", "eye": "eyes", "globe": "planet", "envelope": "letter e-mail",
}  # fmt: skip
NOUNS: Final = {word: name for name, words in _NOUNS.items() for word in (name, *words.split())}
"""Last word of a thing's description -> its basic name."""
SYNONYMS: Final = {
    "plane": "airplane", "bicycle": "bike", "trousers": "pants", "shoe": "boot", "coat": "jacket", "gem": "jewel",
    "boat": "ship", "glasses": "sunglasses", "face": "smiley", "phone": "telephone", "bug": "insect", "meat": "steak",
    "floor": "carpet", "cake": "pie", "bread": "bun", "house": "home",
}  # fmt: skip

ASK_NAME: Final = ("what is this?", "what is shown here?", "what does the picture show?")
ASK_CATEGORY: Final = ("what kind of thing is this?", "which category does this belong to?")
ASK_COLOUR: Final = ("what colour is this?", "which colour is it mostly?", "what is the main colour?")
ASK_THING: Final = ("is there {} in the picture?", "does this show {}?")
ASK_KIND: Final = ("is this {}?", "is there {} in the picture?")
ASK_SHADE: Final = ("is there anything {} here?", "is some of it {}?")


def with_article(thing: str) -> str:
    """`"apple"` -> `"an apple"`; plurals and mass nouns have no article."""
    if thing in MASS or (thing.endswith("s") and not thing.endswith(("ss", "us", "bus"))):
        return thing
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
