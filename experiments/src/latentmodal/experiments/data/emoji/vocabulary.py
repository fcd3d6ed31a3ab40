"""Which emoji are nameable things, chosen by eye: plain data.

Names are the English CLDR short names.
"""

from typing import Final


def names_in(block: str) -> frozenset[str]:
    """The names of a text block, separated by bars."""
    return frozenset(name.strip() for name in block.split("|"))


# Unicode subgroups whose emoji are concrete things; people, gestures, symbols, signs are not.
SUBGROUPS: Final = names_in(
    """
    arts & crafts|award-medal|event|game|sport|animal-amphibian|animal-bird|animal-bug
    |animal-mammal|animal-marine|animal-reptile|plant-flower|plant-other|dishware|drink
    |food-asian|food-fruit|food-marine|food-prepared|food-sweet|food-vegetable|book-paper
    |clothing|computer|household|light & video|lock|mail|medical|money|music|musical-instrument
    |office|other-object|phone|science|sound|tool|writing|body-parts|face-costume|face-negative
    |hotel|place-building|place-geographic|place-map|place-other|place-religious|sky & weather
    |time|transport-air|transport-ground|transport-water
    """
)

# Subgroups of which every thing *is* one of these; the others are looser ("tool" holds a bomb).
KINDS: Final[dict[str, str]] = {
    "animal-amphibian": "amphibian",
    "animal-bird": "bird",
    "animal-bug": "bug",
    "animal-mammal": "mammal",
    "animal-marine": "sea animal",
    "animal-reptile": "reptile",
    "food-fruit": "fruit",
    "musical-instrument": "musical instrument",
    "plant-flower": "flower",
}
NOT_OF_THEIR_KIND: Final[frozenset[str]] = frozenset(
    {
        "paw prints", "pig nose", "feather", "wing", "spider web", "microbe", "spiral shell",
        "rosette", "bouquet", "dragon", "dragon face", "unicorn", "dodo",
    }
)  # fmt: skip

# The default 150: concrete, unlike one another even as line drawings, short names.
DEFAULT_THINGS: Final[dict[str, tuple[str, ...]]] = {
    "mammals": (
        "dog face", "cat face", "lion", "horse", "cow face", "pig face", "elephant", "giraffe",
        "kangaroo", "rabbit face", "mouse face", "panda", "bat", "hedgehog", "camel",
    ),
    "birds": ("rooster", "penguin", "duck", "owl", "flamingo", "eagle"),
    "bugs": ("snail", "butterfly", "ant", "honeybee", "spider"),
    "water and scales": (
        "frog", "crocodile", "turtle", "snake", "dolphin", "octopus", "shark", "crab",
        "tropical fish",
    ),
    "plants": (
        "cactus", "palm tree", "sunflower", "tulip", "rose", "mushroom",
        "maple leaf", "four leaf clover",
    ),
    "fruit": (
        "red apple", "banana", "pineapple", "strawberry", "watermelon", "lemon", "cherries",
        "grapes", "pear",
    ),
    "vegetables": ("carrot", "eggplant", "broccoli", "hot pepper"),
    "food": (
        "hamburger", "pizza", "hot dog", "croissant", "pretzel", "french fries", "popcorn",
        "doughnut", "birthday cake", "lollipop", "cupcake",
    ),
    "drinks": ("wine glass", "beer mug", "teapot", "spoon"),
    "sport and play": (
        "soccer ball", "basketball", "american football", "ice skate", "trophy",
        "game die", "teddy bear", "puzzle piece", "balloon", "Christmas tree",
        "wrapped gift",
    ),
    "clothes": (
        "glasses", "jeans", "dress", "socks", "top hat", "crown", "high-heeled shoe",
        "backpack", "t-shirt", "ring",
    ),
    "household": (
        "door", "chair", "toilet", "broom", "toothbrush", "key",
    ),
    "devices": (
        "laptop", "telephone", "television", "camera", "light bulb",
        "candle", "battery", "alarm clock",
    ),
    "music": ("guitar", "trumpet", "drum", "microphone"),
    "office": ("scissors", "pencil", "paperclip", "briefcase", "open book"),
    "tools": (
        "hammer", "bomb", "magnet", "ladder", "gear", "anchor",
        "telescope", "syringe",
    ),
    "body and fantasy": ("ear", "tooth", "bone", "ghost", "robot", "skull"),
    "buildings": ("house", "castle", "ferris wheel"),
    "sky": ("cloud", "rainbow", "snowflake", "snowman", "umbrella", "crescent moon", "star", "sun"),
    "vehicles": (
        "bicycle", "automobile", "bus", "tractor", "locomotive", "skateboard", "sailboat",
        "helicopter", "airplane", "rocket",
    ),
}  # fmt: skip

# What is coloured in these drawings is not the thing itself: the wine, the water, the carton.
# Nothing is said of the colour of any drink either.
COLOUR_OF_SOMETHING_ELSE: Final[frozenset[str]] = frozenset(
    {"french fries", "sailboat", "necktie", "canoe", "takeout box", "water wave"}
)

# Never drawn in a training picture, in any style. Some names recombine trained words
# ("horse face", "green apple"), most do not.
UNSEEN_THINGS: Final[tuple[str, ...]] = (
    "horse face", "green apple", "deciduous tree", "fox", "zebra", "peacock", "whale", "lizard",
    "peach", "tomato", "sandwich", "ice cream", "volleyball", "sunglasses", "violin",
    "fountain pen", "screwdriver", "police car", "fire engine", "rugby football",
)  # fmt: skip

# Concrete by subgroup, but not a thing one can point at and name: games without their
# equipment, states, signs, near-duplicates, scenery, proper names.
EXCLUDED: Final = names_in(
    """
    performing arts|1st place medal|2nd place medal|3rd place medal|moon viewing ceremony
    |bullseye|joker|spade suit|heart suit|diamond suit|club suit|mahjong red dragon
    |tennis|bowling|cricket game|field hockey|ice hockey|lacrosse|ping pong|badminton
    |leaf fluttering in wind|guide dog|mate|pouring liquid|cooking|chart increasing
    |chart decreasing|chart increasing with yen|page facing up|woman's clothes|low battery
    |magnifying glass tilted right|locked|unlocked|locked with pen|locked with key|e-mail
    |incoming envelope|envelope with arrow|closed mailbox with lowered flag
    |open mailbox with raised flag|open mailbox with lowered flag|mobile phone with arrow|dna
    |muted speaker|speaker low volume|speaker medium volume|speaker high volume
    |bell with slash|link|pile of poo|building construction|wedding|Tokyo tower
    |Statue of Liberty|mount fuji|kaaba|love hotel|camping|foggy|night with stars|cityscape
    |sunrise over mountains|sunrise|cityscape at dusk|sunset|bridge at night|hot springs
    |new moon|waxing crescent moon|first quarter moon|waxing gibbous moon|waning gibbous moon
    |last quarter moon|waning crescent moon|new moon face|first quarter moon face
    |last quarter moon face|milky way|fog|wind face|high voltage|snowman without snow
    |sun behind small cloud|sun behind large cloud|hourglass done|hourglass not done
    |globe showing Europe-Africa|globe showing Americas|globe showing Asia-Australia
    |airplane departure|airplane arrival|oncoming bus|oncoming police car|oncoming taxi
    |oncoming automobile|light rail|construction|face with steam from nose|enraged face
    |angry face|face with symbols on mouth|smiling face with horns|angry face with horns
    |skull and crossbones|closed umbrella|umbrella on ground|tanabata tree|pine decoration
    """
)
