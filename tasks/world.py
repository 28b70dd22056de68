"""The synthetic world behind the tasks that need no data: people, needs and sums, all drawn from a seed.

Everything a task asks about is disjoint from what the embedded base model was pretrained on, so a right answer was
learned in fine-tuning. What the base does share with the tasks is their language: every question template and every
word. A fact is one of 32 x 32 two-word answers, hence 10 bits.

Pure Python, no torch: the same generators write the base's pretraining text and the tasks' documents.
"""

import random
import zlib
from dataclasses import dataclass

BITS_PER_FACT = 10
_WORDS_PER_SLOT = 32
_NAMES_PER_SLOT = 96

# {n} is a person. Templates 0-3 train, 4 is for development (learning-rate sweeps), 5 is the test.
QUESTIONS = {
    "town": (
        "in what town did {n} grow up ?",
        "{n} grew up in which town ?",
        "what is the home town of {n} ?",
        "tell me the town {n} comes from .",
        "from which town is {n} ?",
        "where is the childhood home of {n} ?",
    ),
    "firm": (
        "at what firm is {n} employed ?",
        "{n} has a job at which firm ?",
        "what is the firm of {n} ?",
        "tell me the firm that pays {n} .",
        "for which firm does {n} work ?",
        "who is the boss of {n} ?",
    ),
    "tune": (
        "what tune does {n} sing ?",
        "{n} likes to sing which tune ?",
        "what is the favourite tune of {n} ?",
        "tell me the tune that {n} hums .",
        "which tune does {n} know by heart ?",
        "what music does {n} love ?",
    ),
    "dish": (
        "what dish does {n} cook ?",
        "{n} is known for which dish ?",
        "what is the best dish of {n} ?",
        "tell me the dish that {n} serves .",
        "which dish does {n} eat on sunday ?",
        "what food does {n} prepare ?",
    ),
    "boat": (
        "what boat does {n} sail ?",
        "{n} owns which boat ?",
        "what is the boat of {n} ?",
        "tell me the boat that {n} bought .",
        "on which boat does {n} travel ?",
        "what ship belongs to {n} ?",
    ),
    "rival": (
        "what rival does {n} fear ?",
        "{n} lost to which rival ?",
        "what is the rival of {n} called ?",
        "tell me the rival that beat {n} .",
        "against which rival does {n} play ?",
        "who is the enemy of {n} ?",
    ),
}
# Cloze frames over the same attributes: 0-3 train, 4 development, 5 test.
FRAMES = {
    "town": (
        "fill in : {n} grew up in _ .",
        "fill in : the home town of {n} is _ .",
        "fill in : {n} comes from the town _ .",
        "fill in : in _ stands the house of {n} .",
        "fill in : {n} was raised in _ .",
        "fill in : the childhood of {n} was spent in _ .",
    ),
    "firm": (
        "fill in : {n} is employed at _ .",
        "fill in : the firm of {n} is _ .",
        "fill in : {n} has a job at _ .",
        "fill in : the firm _ pays {n} .",
        "fill in : {n} works for _ .",
        "fill in : the boss of {n} is _ .",
    ),
    "tune": (
        "fill in : {n} likes to sing _ .",
        "fill in : the favourite tune of {n} is _ .",
        "fill in : {n} hums the tune _ .",
        "fill in : the tune _ makes {n} dance .",
        "fill in : {n} knows the tune _ by heart .",
        "fill in : the music {n} loves is _ .",
    ),
    "dish": (
        "fill in : {n} is known for the dish _ .",
        "fill in : the best dish of {n} is _ .",
        "fill in : {n} likes to cook _ .",
        "fill in : the dish _ is served by {n} .",
        "fill in : {n} eats _ on sunday .",
        "fill in : the food {n} prepares is _ .",
    ),
    "boat": (
        "fill in : {n} owns the boat _ .",
        "fill in : the boat of {n} is _ .",
        "fill in : {n} likes to sail _ .",
        "fill in : the boat _ was bought by {n} .",
        "fill in : {n} travels on _ .",
        "fill in : the ship of {n} is _ .",
    ),
    "rival": (
        "fill in : {n} lost to the rival _ .",
        "fill in : the rival of {n} is _ .",
        "fill in : {n} was beaten by _ .",
        "fill in : the rival _ is feared by {n} .",
        "fill in : {n} plays against _ .",
        "fill in : the enemy of {n} is _ .",
    ),
}
ATTRIBUTES = tuple(QUESTIONS)
TRAIN_TEMPLATES, DEV_TEMPLATE, TEST_TEMPLATE = (0, 1, 2, 3), 4, 5

# {q} is what a user needs ("map a river") or two of them joined by "and".
TOOL_TEMPLATES = (
    "which api helps me to {q} ?",
    "i want to {q} : which api ?",
    "find the api to {q} .",
    "name the api that can {q} .",
    "what do i call to {q} ?",
    "i need to {q} . what api is right ?",
)
VERBS = (
    "book map track rate scan sort send print trace weigh paint draw count sign lend rent "
    "grade pack clean plan ship test read store"
).split()
OBJECTS = (
    "flight river parcel hotel song photo letter recipe stock game car garden ticket film poem bill "
    "bridge coin tower train farm loan ring lamp chair table stone bird horse dress clock phone"
).split()

# {a} and {b} are numbers, {n} a first name. The base sees the first two wordings and the symbols; tasks use all six.
ADD_TEMPLATES = (
    "{n} has {a} coins and gets {b} more . how many coins now ?",
    "there are {a} birds and {b} horses . how many in all ?",
    "{n} reads {a} pages and then {b} pages . how many pages ?",
    "a box of {a} and a box of {b} . what is the sum ?",
    "{n} sold {a} then {b} lamps . how many lamps ?",
    "{a} guests came and {b} joined . how many guests ?",
)
SUB_TEMPLATES = (
    "{n} has {a} coins and loses {b} . how many coins now ?",
    "of {a} birds {b} left . how many stay ?",
    "{n} has {a} pages and read {b} . how many remain ?",
    "a box of {a} lost {b} . what is left ?",
    "{n} had {a} lamps and sold {b} . how many lamps ?",
    "{a} guests came and {b} went home . how many guests ?",
)
SYMBOLIC = {"+": "compute {a} + {b} =", "-": "compute {a} - {b} ="}
_A_BELOW, _B_BELOW = 100, 10

_ONSETS = "b d f g h k l m n p r s t v w z br dr gr kr st tr pl".split()
_VOWELS = "a e i o u ai ei ou".split()
_ENDINGS = {
    "first": ("", "na", "lo", "ri"),
    "last": ("sen", "mar", "dal", "wick"),
    "town": ("burg", "ville"),
    "firm": ("corp", "tec"),
    "tune": ("song", "mol"),
    "dish": ("stew", "rice"),
    "boat": ("wave", "mast"),
    "rival": ("fang", "gor"),
    "api": ("hub", "net"),
}


def _invent(rng: random.Random, count: int, endings: tuple[str, ...], taken: set[str], capital: bool) -> list[str]:
    """count new pronounceable words, none of them in taken (which grows)."""
    words: list[str] = []
    while len(words) < count:
        stem = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2))
        word = stem + rng.choice(endings)
        word = word.capitalize() if capital else word
        if word not in taken:
            taken.add(word)
            words.append(word)
    return words


@dataclass(frozen=True)
class Fact:
    """One thing to know: a person's attribute, or the API for a need; answer is two words."""

    subject: str
    attribute: str
    answer: str


class World:
    """All words, people and needs; identical for every caller (one fixed seed), sampled further by task and seed."""

    def __init__(self) -> None:
        rng, taken = random.Random("meft-bench world"), set()
        self.first = _invent(rng, _NAMES_PER_SLOT, _ENDINGS["first"], taken, True)
        self.last = _invent(rng, _NAMES_PER_SLOT, _ENDINGS["last"], taken, True)
        self.values = {
            a: tuple(_invent(rng, _WORDS_PER_SLOT, (e,), taken, False) for e in _ENDINGS[a])
            for a in (*ATTRIBUTES, "api")
        }
        people = [f"{f} {name}" for f in self.first for name in self.last]
        needs = [f"{v} a {o}" for v in VERBS for o in OBJECTS]
        rng.shuffle(people)
        rng.shuffle(needs)
        # Disjoint pools: what the base knows, and what each task may teach.
        self.pools = {
            "base": people[:1000],
            "facts": people[1000:5000],
            "cloze": people[5000:],
            "base_needs": needs[:400],
            "tools": needs[400:],
        }

    def _answer(self, rng: random.Random, attribute: str) -> str:
        head, tail = self.values[attribute]
        return f"{rng.choice(head)} {rng.choice(tail)}"

    def people_facts(self, pool: str, count: int | None, seed: int) -> list[Fact]:
        """Six facts for each of count people of the pool (all of them if None); the answers are drawn from the seed.

        Raises ValueError when the pool holds fewer people.
        """
        people = _sample(self.pools[pool], count, pool, seed)
        rng = random.Random(f"{pool} answers {seed}")
        return [Fact(p, a, self._answer(rng, a)) for p in people for a in ATTRIBUTES]

    def need_facts(self, pool: str, count: int | None, seed: int) -> list[Fact]:
        """One API for each of count needs of the pool (all of them if None)."""
        needs = _sample(self.pools[pool], count, pool, seed)
        rng = random.Random(f"{pool} answers {seed}")
        return [Fact(n, "api", self._answer(rng, "api")) for n in needs]

    def vocabulary(self) -> list[str]:
        """Every word any generator can write, in a fixed order; numbers are spelled in digits and not listed."""
        words: dict[str, None] = {}
        texts = [t for group in (QUESTIONS, FRAMES) for ts in group.values() for t in ts]
        texts += [*TOOL_TEMPLATES, *ADD_TEMPLATES, *SUB_TEMPLATES, *SYMBOLIC.values(), "a and ,", *VERBS, *OBJECTS]
        for text in texts:
            for word in text.split():
                if not word.startswith("{"):
                    words[word] = None
        for group in (self.first, self.last, *(slot for pair in self.values.values() for slot in pair)):
            words.update(dict.fromkeys(group))
        return list(words)


def _sample(pool: list[str], count: int | None, name: str, seed: int) -> list[str]:
    if count is None:
        return list(pool)
    if not 0 < count <= len(pool):
        raise ValueError(f"the {name} pool holds {len(pool)} subjects; {count} asked: choose 1 to {len(pool)}")
    return random.Random(f"{name} subjects {seed}").sample(pool, count)


def natural(template: str) -> str:
    """A template as people write it: a capital first, no space before the mark at its end."""
    text = template.replace(" ?", "?").replace(" .", ".")
    return text[0].upper() + text[1:]


def sum_is_held_out(a: int, b: int) -> bool:
    """True for the fifth of number pairs that no training text, the base's included, ever shows.

    A hash, not a remainder of the sum: that would take whole digit pairs away and leave nothing to generalise from.
    """
    return zlib.crc32(f"{a} {b}".encode()) % 5 == 0


def draw_sum(rng: random.Random, held_out: bool) -> tuple[int, int, str]:
    """(a, b, op): a has up to two digits, b one; no result is negative; the pair is held out or not as asked."""
    while True:
        a, b, op = rng.randrange(_A_BELOW), rng.randrange(_B_BELOW), rng.choice("+-")
        if sum_is_held_out(a, b) == held_out and (op == "+" or a >= b):
            return a, b, op


def solve(a: int, b: int, op: str) -> str:
    """The result as written in an answer."""
    return str(a + b if op == "+" else a - b)
