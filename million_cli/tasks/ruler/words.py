"""The words of keys."""

from __future__ import annotations

import random
import uuid

_ADJECTIVES = """
able acid agile amber ample ancient arctic azure bald basic bitter blank bleak blunt bold brave brief
bright brisk broad broken bronze busy calm careful cheap chilly civil clean clear clever cloudy clumsy
coarse cold common cosmic crimson crisp cruel curious curly daily damp dapper daring dark deep dense
distant dizzy double dreary dry dull dusty eager early earnest easy elastic elder empty equal exact faint
fair faithful famous fancy fast fierce final fine firm flat fluffy foggy fond formal fragile frank free
fresh friendly frosty frozen full funny fuzzy gentle giant glad gloomy golden grand grave greedy green
grim gross handy happy hard harsh hasty heavy hidden hollow honest humble hungry icy idle jolly juicy
keen kind large late lazy lean light little lively lonely long loud lucky lunar mellow merry mighty mild
misty modern modest moist muddy narrow neat nervous noble noisy odd old orange oval pale patient plain
pleasant polite proud pure purple quick quiet rapid rare raw ready rich rigid ripe rough round royal rude
rusty sad safe salty scarce secret serious shaky shallow sharp shiny short shy silent silver simple
sleepy slim slow small smart smooth soft solar solid sour spare spicy steady steep stern stiff strange
strict strong subtle sudden sunny sweet swift tall tame tart tender thick thin tidy tiny tired tough
tricky true ugly urgent usual vague vast violet vivid warm weak wealthy weary wet wide wild wise witty
wooden woolly young zealous
"""
_NOUNS = """
acorn actor album anchor angle ankle answer apple apron arch arrow artist attic author autumn axle badge
bagel banjo banker barrel basin basket beach beacon beard beaver bell bench berry bird biscuit blanket
blossom board boat bonnet book border bottle boulder bowl branch bread brick bridge broom brush bubble
bucket builder butter button cabin cable cactus cake camel camera canal candle cannon canoe canvas
captain caravan carpet carrot castle cave cello chain chair chalk chapel cherry chest chimney cinema
circle city clay cliff clock cloud clover coach coast coat cobbler coffee coin collar comet compass
copper coral corner cottage cotton couch cousin cradle crane crater crayon creek cricket crown crystal
cup curtain cushion dagger daisy dancer deer desert desk diamond dinner doctor dolphin donkey door dragon
drawer dream dress drum duck eagle easel echo editor elbow emerald engine envelope evening falcon farmer
feather fence ferry fiddle field finch flag flame flute forest fork fountain fox frame frog garden garlic
gate ghost giraffe glacier glass glove goat goose grape gravel guitar hammer harbor harp hat hawk hazel
helmet heron hill hinge honey hook horse hotel island ivory jacket jar jewel judge jungle kettle kitchen
kite kitten ladder lake lamp lantern lawyer leaf lemon letter library lily lion lizard lobster locket
lodge magnet mango maple marble market meadow melon mirror mitten monkey moon morning mosaic motor
mountain mouse museum mushroom napkin needle nest nickel notebook nurse oak oasis ocean olive onion opal
orchard organ otter oven owl oyster paddle painter palace panda paper parade parrot pasture path peach
peacock pearl pebble pencil pepper piano pigeon pillow pilot pine pirate planet plate plum pocket poet
pond poppy portrait potato prince puzzle quartz quilt rabbit radish raft railway rainbow raven ribbon
river robin rocket roof rope rose saddle sailor salad sandal satchel saucer scarf school scissors seal
shadow shell shepherd shield shovel singer sister skater sled snail soap soldier spider spoon spring
squirrel stable statue stone storm stove street sugar summer sunset swan table tailor teacher temple tent
theater thimble thunder tiger timber tower tractor train trumpet tulip tunnel turtle umbrella uncle
valley vase velvet village violin volcano wagon waiter wallet walnut walrus water whale wheat whistle
willow window winter wizard wolf writer yacht zebra
"""


ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()


def key(rng: random.Random) -> str:
    """An adjective and a noun, such as "brisk-otter"."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def number(rng: random.Random) -> str:
    """Seven digits."""
    return str(rng.randint(1_000_000, 9_999_999))


def uuid4(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
