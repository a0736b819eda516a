"""Writes the starter prompts that are in the package: plain descriptions for first tries.

Every prompt is put together from the lists below, at random from a fixed seed, so the file is the
same each time. Run it without arguments to write `src/diffusion2gan/starter_prompts.txt`.
"""

from __future__ import annotations

import random
from pathlib import Path

COUNT = 4096
OUT = Path(__file__).parents[1] / "src" / "diffusion2gan" / "starter_prompts.txt"

ANIMALS = (
    "cat|dog|horse|fox|owl|rabbit|bear|elephant|tiger|lion|giraffe|zebra|penguin|parrot|eagle|swan|"
    "duck|goat|sheep|cow|pig|squirrel|hedgehog|frog|turtle|dolphin|whale|octopus|butterfly|beetle|"
    "otter|raccoon|wolf|deer|camel|llama|peacock|flamingo|lizard|goldfish"
).split("|")
ANIMAL_WORDS = (
    "small|young|old|sleepy|wet|white|black|brown|spotted|fluffy|curious|playful|grey|large"
).split("|")
ANIMAL_ACTS = (
    "sitting on a wooden fence|running through tall grass|looking into the camera|asleep on a rug|"
    "drinking from a stream|standing in the snow|under an umbrella|beside a campfire|"
    "on a sandy beach|in a vegetable garden|reflected in a puddle|on top of a hill|"
    "behind a window|next to a red bicycle|in the morning fog|among autumn leaves"
).split("|")
PEOPLE = (
    "farmer|baker|painter|carpenter|fisherman|nurse|teacher|violinist|drummer|gardener|astronaut|"
    "diver|cyclist|sailor|chef|librarian|firefighter|potter|photographer|tailor|blacksmith|dancer|"
    "scientist|climber|grandmother|grandfather|postman|shepherd|pilot|mechanic"
).split("|")
PEOPLE_ACTS = (
    "reading a newspaper|holding a lantern|waiting for a bus|walking a dog|repairing a clock|"
    "laughing at a table|carrying a basket of apples|looking out to sea|writing in a notebook|"
    "drinking tea|standing in a doorway|feeding pigeons|playing chess|crossing a bridge|"
    "under a street lamp|with a straw hat"
).split("|")
THINGS = (
    "teapot|guitar|typewriter|pair of boots|bicycle|lamp|wooden chair|clock|umbrella|camera|"
    "backpack|globe|chess set|violin|candle|vase|radio|suitcase|telescope|sewing machine|kettle|"
    "pocket watch|toy robot|model ship|glass bottle|paper boat|notebook|bird cage|mirror|anchor"
).split("|")
MATERIALS = (
    "wooden|brass|glass|porcelain|stone|paper|rusty|silver|painted|leather|knitted|marble|copper|"
    "transparent|broken|shiny|dusty"
).split("|")
COLOURS = "red|orange|yellow|green|blue|purple|pink|white|black|turquoise|golden|grey".split("|")
SURFACES = (
    "on a kitchen table|on a windowsill|on a pile of books|on a white background|in a shop window|"
    "on a marble floor|in the grass|on a beach towel|on an old piano|on a workbench|"
    "in an open drawer|on a wooden crate|half buried in sand|beside a fireplace"
).split("|")
FOODS = (
    "bowl of noodles|loaf of bread|slice of chocolate cake|plate of pancakes|basket of tomatoes|"
    "cup of coffee|pile of oranges|vegetable soup|cheese board|apple pie|glass of lemonade|"
    "plate of dumplings|fruit salad|grilled fish|jar of honey|bunch of grapes|ice cream cone|"
    "plate of spaghetti|bowl of cherries|stack of waffles"
).split("|")
FOOD_WORDS = (
    "seen from above|with steam rising from it|on a blue plate|on a picnic blanket|"
    "in a small restaurant|on a stone counter|with mint leaves on top|beside a folded napkin|"
    "in warm evening light|on a tray"
).split("|")
PLACES = (
    "mountain lake|desert road|fishing harbour|pine forest|old city street|wheat field|waterfall|"
    "lighthouse on a cliff|village in a valley|market square|railway station|castle on a hill|"
    "rice terrace|frozen river|tropical beach|canal with boats|wooden cabin|stone bridge|windmill|"
    "lavender field|city skyline|narrow alley|greenhouse|library hall|empty swimming pool|"
    "subway platform|vineyard|volcano|cave|meadow of wild flowers"
).split("|")
TIMES = (
    "at sunrise|at noon|at sunset|at night|in the rain|in heavy snow|in thick fog|"
    "under a full moon|under a cloudy sky|after a storm|in early spring|in autumn|in summer|"
    "in winter|with a rainbow|under the stars"
).split("|")
VEHICLES = (
    "steam train|sailing boat|hot air balloon|fire engine|tractor|scooter|tram|pickup truck|"
    "rowing boat|helicopter|vintage car|double-decker bus|cargo ship|glider|camper van|submarine"
).split("|")
VEHICLE_ACTS = (
    "crossing a bridge|parked under a tree|in front of a mountain|on a country road|"
    "at the edge of a lake|in a busy street|seen from above|in front of a yellow wall|"
    "leaving a tunnel|in the distance"
).split("|")
PLANTS = (
    "sunflower|cactus|oak tree|rose|bonsai|mushroom|fern|tulip|palm tree|water lily|cherry tree|"
    "dandelion|bamboo|maple tree|orchid|pumpkin"
).split("|")
PLANT_WORDS = (
    "in a clay pot|covered with dew|in bloom|against a blue sky|beside a brick wall|in the wind|"
    "in a misty garden|growing through a crack in the pavement|with a bee on it|under glass"
).split("|")
STYLES = (
    "a photo of {}|a close-up photo of {}|a black and white photo of {}|a watercolour of {}|"
    "an oil painting of {}|a pencil drawing of {}|a 3D render of {}|a woodcut of {}|"
    "a pixel art picture of {}|a paper collage of {}|a cartoon of {}|a charcoal sketch of {}|"
    "a stained glass window that shows {}|an aerial photo of {}|a low-poly render of {}|"
    "a children's book illustration of {}"
).split("|")
NUMBERS = "two|three|four|five".split("|")


def with_article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def draw_subject(rng: random.Random) -> str:
    """One subject with its surroundings, such as "a rusty kettle on a workbench"."""
    kind = rng.randrange(9)
    if kind == 0:
        animal = f"{rng.choice(ANIMAL_WORDS)} {rng.choice(ANIMALS)}"
        return f"{with_article(animal)} {rng.choice(ANIMAL_ACTS)}"
    if kind == 1:
        return f"{with_article(rng.choice(PEOPLE))} {rng.choice(PEOPLE_ACTS)}"
    if kind == 2:
        thing = f"{rng.choice(MATERIALS)} {rng.choice(THINGS)}"
        return f"{with_article(thing)} {rng.choice(SURFACES)}"
    if kind == 3:
        return f"{with_article(rng.choice(FOODS))} {rng.choice(FOOD_WORDS)}"
    if kind == 4:
        return f"{with_article(rng.choice(PLACES))} {rng.choice(TIMES)}"
    if kind == 5:
        vehicle = f"{rng.choice(COLOURS)} {rng.choice(VEHICLES)}"
        return f"{with_article(vehicle)} {rng.choice(VEHICLE_ACTS)}"
    if kind == 6:
        return f"{with_article(rng.choice(PLANTS))} {rng.choice(PLANT_WORDS)}"

    # Several things, to be counted or distinguished
    first, second = rng.sample(THINGS[:3] + THINGS[4:], 2)
    if kind == 7:
        left = with_article(f"{rng.choice(COLOURS)} {first}")
        right = with_article(f"{rng.choice(COLOURS)} {second}")
        return f"{left} beside {right}"
    return f"{rng.choice(NUMBERS)} {rng.choice(COLOURS)} {rng.choice(PLURALS)} in a row"


PLURALS = (
    "balloons|apples|chairs|birds|candles|umbrellas|boats|houses|books|bottles|cups|hats|doors|"
    "windows|mushrooms|lemons|stones|kites|shoes|lanterns"
).split("|")


def draw_prompt(rng: random.Random) -> str:
    """A subject alone, in two of five cases, or in a style."""
    subject = draw_subject(rng)
    if rng.random() < 0.4:
        return subject
    return rng.choice(STYLES).format(subject)


def starter_prompts() -> list[str]:
    """COUNT different prompts."""
    rng = random.Random(0)
    prompts: dict[str, None] = {}
    while len(prompts) < COUNT:
        prompts[draw_prompt(rng)] = None
    return list(prompts)


if __name__ == "__main__":
    OUT.write_text("\n".join(starter_prompts()) + "\n", encoding="utf-8")
