"""Words of the prompts: 168 emoji with one word each, their plurals and articles, and ten background colours."""

_TABLE = """
monkey=monkey face, gorilla, orangutan, dog=dog face, poodle, wolf=wolf face, fox=fox face, raccoon, cat=cat face, lion=lion
face, tiger=tiger face, leopard, moose, donkey, horse=horse face, unicorn=unicorn face, zebra=zebra face, deer, bison,
cow=cow face, pig=pig face, boar, ram, sheep, goat, camel=bactrian camel, llama, giraffe=giraffe face, elephant, mammoth,
rhinoceros, hippopotamus, mouse=mouse face, rat, hamster=hamster face, rabbit=rabbit face, chipmunk, beaver, hedgehog, bat,
bear=bear face, koala, panda=panda face, sloth, otter, skunk, kangaroo, badger, turkey, chicken, rooster, chick=baby chick,
bird, penguin, dove, eagle, duck, swan, owl, dodo, feather, flamingo, peacock, parrot, goose, phoenix, frog=frog face,
crocodile, turtle, lizard, snake, dragon=dragon face, dinosaur=sauropod, whale=spouting whale, dolphin, seal, fish,
blowfish, shark, octopus, shell=spiral shell, jellyfish, crab, lobster, shrimp, squid, oyster, snail, butterfly,
caterpillar=bug, ant, bee=honeybee, beetle, ladybug=lady beetle, cockroach, spider, scorpion, mosquito, fly, worm, microbe,
lotus, rose, hibiscus, sunflower, blossom, tulip, hyacinth, seedling, cactus, shamrock, mushroom, melon, watermelon,
tangerine, lemon, lime, banana, pineapple, mango, apple=red apple, pear, peach, strawberry, kiwi=kiwifruit, tomato, coconut,
avocado, eggplant=aubergine, potato, carrot, pepper=bell pepper, chili=hot pepper, cucumber, broccoli, onion, chestnut,
croissant, baguette=baguette bread, pretzel, bagel, waffle, hamburger, sandwich, taco, burrito, egg, doughnut, cookie,
cupcake, pie, lollipop, teapot, pumpkin=jack-o-lantern, balloon, gift=wrapped present, trophy, basketball=basketball and
hoop, volleyball, football=american football, kite, teddy=teddy bear, jar, spoon, ticket, heart=black heart suit,
diamond=black diamond suit, pawn=chess pawn
"""
"""Words; those whose picture has another name with it."""

EMOJI = {
    word: name or word for word, _, name in (" ".join(entry.split()).partition("=") for entry in _TABLE.split(","))
}
"""Word of a prompt, and the name that :func:`fp4dit_ao.reference.prompts` has for the picture."""

COLOURS = {
    "white": (255, 255, 255), "black": (35, 35, 40), "grey": (150, 150, 155), "red": (205, 60, 60), "orange": (240, 150, 60),
    "yellow": (245, 215, 90), "green": (80, 165, 95), "blue": (75, 125, 215), "purple": (140, 90, 185), "pink": (240, 165, 195),
}  # fmt: skip
"""Background colours, RGB."""

_SAME = ("moose", "deer", "bison", "sheep", "fish", "blowfish", "jellyfish", "shrimp", "squid")
_IRREGULAR = {word: word for word in _SAME} | {
    "mouse": "mice", "wolf": "wolves", "goose": "geese", "octopus": "octopuses", "hippopotamus": "hippopotamuses",
    "potato": "potatoes", "tomato": "tomatoes", "mango": "mangoes", "cactus": "cacti",
}  # fmt: skip


def plural(word: str) -> str:
    """Plural of an emoji's word."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def with_article(words: str) -> str:
    """The words after "a" or "an"."""
    return ("an " if words[0] in "aeiou" and not words.startswith("uni") else "a ") + words


TEXT_LENGTH = 16
"""Tokens of a prompt, padding included."""
