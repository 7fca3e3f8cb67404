"""Varied captions from a grammar, which the covariance of a text encoder is measured on.

They stand in for the paper's hundred thousand captions from the web. Only the spread of encodings matters, not sense.
"""

import re
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _lines(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in re.split(r"[\n|]", text) if part.strip())


# {name} stands for one of the alternatives under that name, {names} for its plural.
GRAMMAR: dict[str, tuple[str, ...]] = {
    "person": _words("""man woman boy girl child baby farmer dancer chef king queen sailor nurse soldier astronaut
        wizard student teacher musician painter grandmother grandfather couple bride knight cyclist skier pirate monk
        tourist doctor firefighter athlete model toddler ballerina surfer samurai viking cowboy princess clown witch
        detective fisherman carpenter scientist barista skateboarder rider boxer singer neighbour friend"""),
    "animal": _words("""cat dog horse bird fish teddy rabbit fox wolf bear lion tiger elephant giraffe owl eagle parrot
        duck swan frog turtle snake spider bee butterfly whale shark octopus mouse squirrel deer cow sheep pig goat hen
        dragon unicorn kitten puppy husky corgi poodle hamster penguin zebra monkey gorilla peacock flamingo crab snail
        lizard dinosaur panda koala raccoon hedgehog dolphin"""),
    "object": _words("""mug teapot bowl cup vase lamp chair table sofa clock book guitar piano violin camera phone
        laptop umbrella hat shoe boot bag backpack ring necklace sword key candle mirror bottle box basket balloon kite
        toy robot statue teddy star ball drum mask crown bench telescope typewriter watch pillow blanket bed desk shelf
        sink bathtub helmet dress jacket sweater scarf tie suitcase pencil brush map letter coin flag wheel fan
        chandelier doll trophy bucket spoon knife plate jar kettle radio television keyboard headphones sunglasses"""),
    "vehicle": _words("""car boat truck bus train tram airplane helicopter rocket tractor motorbike scooter ship canoe
        van bicycle skateboard taxi ambulance submarine spaceship sailboat carriage jeep"""),
    "food": _words("""apple banana orange strawberry bread cake pizza burger soup salad sushi pancake sandwich cheese
        egg rice coffee tea wine chocolate cookie pie noodles lemon tomato carrot avocado mushroom pasta steak salmon
        croissant donut cupcake juice beer honey grapes pumpkin ramen curry taco waffle"""),
    "plant": _words("tree flower rose cactus mushroom leaf tulip sunflower fern palm bonsai bush vine oak moss"),
    "scenery": _words("""mountain river lake waterfall forest desert cloud moon sun rainbow volcano island glacier
        meadow cave canyon valley beach ocean sky galaxy sunset storm coastline vineyard jungle field garden"""),
    "building": _words("""house castle church tower barn lighthouse cottage temple skyscraper windmill hut palace
        library bridge door window fountain staircase cathedral mosque pagoda factory stadium cabin hotel museum"""),
    "thing": ("{animal}", "{animal}", "{object}", "{object}", "{object}", "{vehicle}", "{food}", "{plant}",
              "{building}"),
    "being": ("{person}", "{person}", "{animal}"),
    "colour": _words("""red orange yellow green blue purple pink white red orange yellow green blue purple pink white
        black grey brown golden silver turquoise crimson teal beige navy maroon lilac two-tone pale dark bright
        colourful"""),
    "pattern": _words("striped dotted checkered plain floral spotted plaid woven patchwork embroidered painted"),
    "material": _words("""wooden metal glass plastic stone ceramic leather knitted paper rusty marble brass copper
        crystal concrete velvet silk porcelain clay bamboo woollen origami"""),
    "look": _words("""shiny furry fluffy old new broken tiny huge small large tall round square antique modern cute
        elegant weird happy sad angry sleepy beautiful simple detailed famous cheap expensive wet dusty frozen
        transparent nice good clean dirty cool cropped close-up vintage abandoned futuristic cosy lonely mysterious
        fresh delicious homemade playful majestic smiling realistic handmade luxury"""),
    "quality": ("{colour}", "{colour}", "{colour}", "{pattern}", "{material}", "{look}", "{look}",
                "{pattern} {colour}", "{look} {colour}", "{look} {material}", "{colour} and {colour}"),
    "some": _lines("""a | a | a | a | a | the | the | my | one | her | this | another"""),
    "count": _lines("""two | three | four | five | six | seven | a dozen | several | many | a group of | a pile of
        a row of | a pair of | lots of | some"""),
    "wearing": _lines("""wearing a hat | wearing a hat | with a hat | wearing sunglasses | wearing a {colour} {object}
        in a {colour} dress | in a suit | with a {look} {object} | with long hair | with a beard | with {colour} eyes
        dressed as a {person} | wearing a {material} jacket"""),
    "doing": _lines("""sleeping | running | jumping | sitting | standing | flying | swimming | eating {food} | dancing
        reading a {object} | playing the guitar | riding a {vehicle} | riding a horse | drinking {food} | smiling
        laughing | crying | cooking | painting | fishing | looking up | holding a {colour} {object}
        driving a {vehicle} | climbing | waiting | working | singing | playing with a {object} | looking at the camera
        carrying a {object} | playing football | chasing a {animal} | walking a dog | lying down | talking on the phone
        taking a selfie"""),
    "relation": _lines("""left of | left of | to the left of | right of | to the right of | in | on | on | next to
        behind | in front of | under | above | near | inside | on top of | facing | beside | leaning against | and
        looking at | with | made of | surrounded by | without"""),
    "weather": _lines("""in the rain | in the fog | at sunset | at dawn | on a sunny day | in a storm
        under a cloudy sky | in winter | in autumn | in spring | in summer | at midnight | in the morning
        under a rainbow | in the wind"""),
    "place": _lines("""in the grass | on the grass | on grass | on the beach | at the beach | on a beach | in the snow
        in snow | at night | in the night | under the night sky | in the desert | in a desert
        in front of a brick wall | by a brick wall | in the forest | in a kitchen | on a table | on a wooden floor
        in the city | on the street | under water | on the moon | in space | in a garden | by the sea | on a mountain
        in a museum | at a market | in a library | on a shelf | in the park | in a field of flowers | on a boat
        in front of a window | in a dark room | on a white background | in the jungle | at a wedding | in an office
        on the roof | in a {material} box | in front of a {building} | near a {scenery} | in {city} | in a living room
        at the airport | in a hospital | at school | on a {colour} {object} | in a swimming pool | in the bathroom
        on a cobblestone road | at a concert | in a restaurant | on a {colour} background"""),
    "name": _words("emma jack luna oliver grace leo ruby sam daisy max sophie henry rosa omar yolanda gwen mario"),
    "city": _words("Paris London Tokyo Venice Rome Berlin Cairo India China Iceland Mexico Kyoto Havana Texas Norway"),
    "medium": _lines("""a photo of | a photo of | a photo of | a picture of | a drawing of | an image of | photo of
        a rendering of | a painting of | an oil painting of | a watercolour of | a pencil sketch of | a close-up of
        a close-up photo of | a black and white photo of | a portrait of | a statue of | a cartoon of | a poster of
        concept art of | an illustration of | a vintage photograph of | a blurry photo of | a cropped photo of
        a good photo of | a bright photo of | the photo of | a low poly model of | an aerial view of | a macro shot of
        a stock photo of | a 3d render of | a tattoo of | a sticker of | a mosaic of | a child's drawing of
        a screenshot of | a logo of | a sculpture of | a selfie with | a postcard of | a collage of"""),
    "style": _lines("""in the style of a comic | pixel art | studio lighting | soft light | golden hour | high contrast
        35mm film | bokeh | minimalist | art deco | baroque | cyberpunk | steampunk | impressionist | surreal
        isometric | wide angle | long exposure | sharp focus | muted colours | vivid colours | trending | 4k
        highly detailed | hand drawn | children's book | ukiyo-e | stained glass | anime | film noir | depth of field
        macro | by a famous painter | pop art | line art | product photography | fisheye lens | double exposure
        backlit | street photography | cinematic | fantasy | matte painting | retro poster | risograph | moody
        pastel"""),
    "idea": _lines("""love | summer | freedom | silence | birthday party | holiday | music | science | war and peace
        home | dream | memory | speed | Christmas | Halloween | family | business | travel | nature | fashion
        architecture | sports | education | health | technology"""),
    "one": ("{some} {quality} {thing}", "{some} {quality} {thing}", "{some} {quality} {being}", "{some} {thing}",
            "{some} {being}", "{some} {being} {wearing}", "{some} {quality} {animal} {wearing}", "{count} {things}",
            "{count} {quality} {things}", "{count} {beings}", "{name}", "{name} the {quality} {animal}"),
    "scene": ("{one} {place}", "{one} {place}", "{one}, {place}", "{one} {relation} {one}",
              "{one} {relation} {one} {place}", "{one} {doing}", "{one} {doing} {place}", "{one} {doing} {weather}",
              "{one} {relation} {one} {weather}", "{one} in the {scenery} {weather}"),
    "tags": ("{style}, {style}", "{style}, {style}, {style}", "{look}, {style}, {colour}, {style}, {idea}"),
    "story": (
        "{one} {doing} {place} while {one} {doing} {weather}, seen through a {look} {building} window",
        "{one} and {one} {doing} together {place}, and behind them {one} {relation} {one} {weather}",
        "after a long day, {one} came home to find {one} {doing} {place} with {count} {quality} {things}",
        "there is {one} {relation} {one} {place}; it is {look}, {colour} and very {look}, and it stands {weather}",
        "view of the {look} {scenery} and the {building} {weather}, with {one} {place} and {count} {beings} {doing}",
        "this {look} {object} is made of {material} parts, painted {colour}, and shown {relation} {one} {place}",
    ),
    "title": ("how to draw {some} {being} step by step", "{count} {look} ideas for your {object}",
              "{look} {building} for sale in {city}", "{city} {scenery} wallpaper", "{idea} and {idea}, {style} poster",
              "{colour} {material} {object}, size {count}", "the {look} {person} of {city}", "recipe for {food}"),
    "plate": ("{look} {food} with {food} and {food} on a {colour} plate", "a {material} plate of {food} {place}",
              "a cup of {food} and a {look} {food} {weather}"),
    "caption": ("{quality} {thing}", "{being} {doing}", "{scene}", "{scene}", "{scene}", "{scene}", "{medium} {one}",
                "{medium} {scene}", "{medium} {scene}", "{medium} {scene}", "{scene}, {tags}", "{medium} {one}, {tags}",
                "{thing}, {tags}", "{scenery}, {idea}, {tags}", "{story}", "{title}", "{plate}", "{scenery} {weather}",
                "{scene}. {scene}", "{medium} {story}, {tags}"),
}
IRREGULAR = {"man": "men", "woman": "women", "child": "children", "mouse": "mice", "leaf": "leaves", "wolf": "wolves",
             "knife": "knives", "shelf": "shelves", "scarf": "scarves", "fisherman": "fishermen", "fish": "fish",
             "sheep": "sheep", "deer": "deer", "tomato": "tomatoes", "bread": "bread", "cheese": "cheese"}
LONGEST = 40  # words


def captions(seed: int = 0, count: int = 4000) -> list[str]:
    """`count` different English captions of 2 to 40 words, the same for the same seed."""
    random = Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        text = re.sub(r"\b(a|A) (?=[aeiou])", r"\1n ", _expand("caption", random))
        if 2 <= len(text.split()) <= LONGEST:
            found[text] = None
    return list(found)


def _expand(name: str, random: Random) -> str:
    """One of the alternatives under `name`, with every {name} in it expanded; a plural where only that is asked for."""
    if name not in GRAMMAR:
        return _plural(_expand(name.removesuffix("s"), random))
    return re.sub(r"\{(\w+)\}", lambda match: _expand(match[1], random), random.choice(GRAMMAR[name]))


def _plural(noun: str) -> str:
    if noun in IRREGULAR or noun.endswith("s"):
        return IRREGULAR.get(noun, noun)
    return re.sub(r"(?<=[^aeiou])y$", "ie", noun) + ("es" if re.search(r"(ch|sh|x)$", noun) else "s")
