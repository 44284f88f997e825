"""General English for the voice and the encoder: a small sentence grammar and random words.

A model that hears or says only the domain's sentences learns them as melodies; these keep the sounds free of the
phrases. Everything here is our own writing. Knows nothing of the domain. Used by `corpus`.
"""

from __future__ import annotations

import random

NOUNS = """apple arm baby back bag ball bank bed bell bird boat body book bottle box boy bread bridge brother brush bus
butter cake camera car card cat chair child church city class clock cloud coat coffee corner country cow cup day desk
dinner doctor dog door dress driver ear earth egg engine evening eye face family farm father field finger fire fish
floor flower foot forest fork friend fruit game garden gate girl glass grass ground group guest hair hall hand hat head
heart hill holiday horse hospital hotel hour house island job journey judge juice key kitchen knife lady lake lamp
language leaf leg letter library light lion list lunch machine man map market meal meat milk minute mirror money month
moon morning mother mountain mouse mouth music name neck night nose number office oil orange page paper park party path
pen pencil picture plane plant plate pocket police pool potato price queen question radio rain ring river road roof room
rose sailor salt school sea seat sheep ship shirt shoe shop shoulder sister sky sleep snow soap son song soup spoon
spring square stair star station stone story street student sugar summer sun table teacher team tea thing ticket tiger
tooth tower town toy train tree truck uncle valley village visitor voice wall water
weather week wheel wife wind window winter woman wood word world year yellow youth zebra zoo""".split()
ADJECTIVES = """angry beautiful big black blue bright brown busy careful cheap clean clear clever cold cool dark deep
dirty dry early easy empty fair famous fast fat fine flat free fresh full funny gentle good great green grey happy hard
heavy high hot huge kind large late lazy light little long loud low lucky narrow new nice noisy old open orange pale
pink plain poor pretty quick quiet red rich right round sad safe sharp short shy simple slow small smooth soft sour
strange strong sweet tall thick thin tired tiny ugly
warm weak wet white whole wide wild wise wrong young""".split()
VERBS = """asks breaks brings builds buys carries catches chooses cleans closes cooks counts covers cuts draws drinks
drives eats enjoys feels finds fixes follows forgets gets gives hears helps hides holds joins jumps keeps kicks knows
laughs learns leaves likes loses loves makes meets moves needs opens paints passes pays picks plays pulls pushes puts
reads remembers runs sees sells sends shows shuts sings sits sleeps starts steals stops swims takes talks teaches thinks
throws touches tries turns uses visits
waits walks wants washes watches wears wins works writes""".split()
PLACES = """above across after around at before behind below beside between by from in inside into near next off on
outside over past
through to toward under until up with without""".split()
ADVERBS = """again almost already always away badly carefully early easily far here inside just late loudly maybe never
now often once only outside perhaps quickly quietly rather really sometimes slowly soon still suddenly there together
too twice usually
very well yesterday""".split()
NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen
nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand first second third half""".split()
MONTHS = "january february march april may june july august september october november december".split()
SMALL = """i you he she it we they me him her us them my your his our their this that these those who what where when
why how which and but or if because so than then as not no yes is are was were be been am has have had do does did will
would can could
should may might must a an the some any all both each every many much more most few other""".split()
OTHER = """account address agreement airport amount answer apartment appointment area arrive attention available balance
battery beginning believe better birthday borrow breakfast building business calendar cancel careful certain change
charge choice company complete computer condition confirm connect continue contract correct customer damage decide
delivery department different difference difficult discover discuss distance document electric enough entrance envelope
example excellent expect expensive experience explain finish flight foreign forget future general government happen
health history hundred husband idea important improve information insurance interest invite kilometer knowledge language
laptop lawyer leather measure medicine member message middle million mistake modern moment national nature necessary
neighbour nothing notice offer opinion ordinary package parcel passport password patient payment people perfect
permission person phone pleasure possible practice prepare present president private probably problem produce product
program promise provide public quality quarter reason receive recent receipt record refund remember repair repeat reply
report request reserve result return salary schedule science season secret service several signature similar special
station strength subject success sudden support surprise system telephone television temperature thousand together
tomorrow tonight traffic travel treatment trouble umbrella understand university useful vacation value variety vegetable
vehicle voucher wallet wedding weekend welcome whether whisper worry yourself""".split()
ALL_WORDS = sorted(set(NOUNS + ADJECTIVES + VERBS + PLACES + ADVERBS + NUMBERS + MONTHS + SMALL + OTHER))

_PATTERNS = (
    "the {a} {n} {v} the {n} {p} the {n}",
    "my {n} {v} a {a} {n} {r}",
    "{r} the {n} {v} {p} the {a} {n}",
    "there is a {a} {n} {p} the {n}",
    "there are {m} {a} things {p} the {n}",
    "why is the {n} so {a}",
    "the {n} and the {n} are {r} {a}",
    "we can see the {n} {p} the {a} {n}",
    "i think the {a} {n} {v} {r}",
    "he {v} the {n} because it is {a}",
    "she {v} her {n} {p} the {n} in {t}",
    "where did you put the {a} {n}",
    "if the {n} is {a} then it {v} the {n}",
    "do you want a {n} or a {a} {n}",
    "in {t} the {n} {v} the {a} {n}",
    "please give me the {n} and {m} {a} ones",
    "they have a {n} with {m} parts and a {a} {n}",
    "{o} and {o} are not the same {n}",
    "it is a question of {o} and {o}",
    "the {o} of the {n} was {a}",
    "nobody {v} the {o} {p} our {n}",
    "what a {a} {n} that is",
)


def general_sentence(rng: random.Random) -> str:
    """A grammatical sentence of no sense, 5-12 words, without punctuation."""
    pools = {"a": ADJECTIVES, "n": NOUNS, "v": VERBS, "p": PLACES, "r": ADVERBS, "m": NUMBERS, "t": MONTHS, "o": OTHER}
    sentence = rng.choice(_PATTERNS)
    while "{" in sentence:
        for key, pool in pools.items():
            sentence = sentence.replace("{" + key + "}", rng.choice(pool), 1)
    return sentence


def random_words(rng: random.Random, low: int = 2, high: int = 8) -> str:
    """Words in no order: nothing can be guessed from its neighbour."""
    return " ".join(rng.choice(ALL_WORDS) for _ in range(rng.randint(low, high)))
