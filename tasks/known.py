"""What a pretrained model may know before it is taught anything: sentences whose last words are a plain fact.

Kinds of the same form, so that a right answer can be weighed against others of its kind. And a text that nobody trained
on, for the loss. Pure Python, no torch.
"""

from dataclasses import dataclass

KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "capital": (
        "The capital of {} is",
        {
            "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
            "Greece": "Athens", "Austria": "Vienna", "Poland": "Warsaw", "Hungary": "Budapest", "Sweden": "Stockholm",
            "Norway": "Oslo", "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin", "Russia": "Moscow",
            "Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi", "Japan": "Tokyo", "China": "Beijing",
            "South Korea": "Seoul", "Thailand": "Bangkok", "Vietnam": "Hanoi", "Indonesia": "Jakarta",
            "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Canada": "Ottawa", "Iran": "Tehran",
            "Iraq": "Baghdad",
        },
    ),
    "symbol": (
        "The chemical symbol of {} is",
        {
            "hydrogen": "H", "helium": "He", "carbon": "C", "nitrogen": "N", "oxygen": "O", "sodium": "Na",
            "magnesium": "Mg", "silicon": "Si", "chlorine": "Cl", "potassium": "K", "calcium": "Ca", "iron": "Fe",
            "copper": "Cu", "zinc": "Zn", "silver": "Ag", "tin": "Sn", "gold": "Au", "mercury": "Hg", "lead": "Pb",
            "uranium": "U",
        },
    ),
    "continent": (
        "{} is a country in",
        {
            "Brazil": "South America", "Argentina": "South America", "Bolivia": "South America", "Nigeria": "Africa",
            "Ghana": "Africa", "Morocco": "Africa", "Ethiopia": "Africa", "India": "Asia", "Pakistan": "Asia",
            "Mongolia": "Asia", "Nepal": "Asia", "Belgium": "Europe", "Switzerland": "Europe", "Romania": "Europe",
            "Bulgaria": "Europe", "Mexico": "North America",
        },
    ),
    "opposite": (
        "The opposite of {} is",
        {
            "hot": "cold", "big": "small", "up": "down", "left": "right", "day": "night", "wet": "dry", "old": "young",
            "fast": "slow", "light": "dark", "rich": "poor", "early": "late", "open": "closed", "full": "empty",
            "hard": "soft", "happy": "sad", "strong": "weak",
        },
    ),
    "language": (
        "The language spoken by most people in {} is",
        {
            "Brazil": "Portuguese", "Mexico": "Spanish", "Egypt": "Arabic", "Japan": "Japanese", "Russia": "Russian",
            "Iran": "Persian", "Austria": "German", "Israel": "Hebrew", "Greece": "Greek", "Turkey": "Turkish",
            "Poland": "Polish", "Hungary": "Hungarian", "Sweden": "Swedish", "Thailand": "Thai",
        },
    ),
    "young": (
        "A young {} is called a",
        {
            "dog": "puppy", "cat": "kitten", "cow": "calf", "sheep": "lamb", "horse": "foal", "bear": "cub",
            "deer": "fawn", "frog": "tadpole", "duck": "duckling", "goat": "kid",
        },
    ),
    "author": (
        "{} was written by",
        {
            "Hamlet": "William Shakespeare", "Pride and Prejudice": "Jane Austen", "War and Peace": "Leo Tolstoy",
            "The Odyssey": "Homer", "Don Quixote": "Miguel de Cervantes", "Moby-Dick": "Herman Melville",
            "Frankenstein": "Mary Shelley", "Oliver Twist": "Charles Dickens", "1984": "George Orwell",
            "The Old Man and the Sea": "Ernest Hemingway", "Dracula": "Bram Stoker", "Faust": "Goethe",
        },
    ),
}  # fmt: skip
"""Kind -> (sentence, subject -> answer)."""


@dataclass(frozen=True)
class Known:
    """One thing that a model may know."""

    kind: str
    prompt: str
    answer: str
    others: tuple[str, ...]
    """Answers of the same kind that are wrong here, in a fixed order."""


def questions(others: int = 4) -> list[Known]:
    """Every sentence, each with so many wrong answers of its kind: those that follow it in the list."""
    found = []
    for kind, (sentence, pairs) in KINDS.items():
        answers = list(dict.fromkeys(pairs.values()))
        for subject, answer in pairs.items():
            place = answers.index(answer)
            wrong = [answers[(place + i) % len(answers)] for i in range(1, min(others, len(answers) - 1) + 1)]
            found.append(Known(kind, sentence.format(subject), answer, tuple(wrong)))
    return found


HELD_OUT = (
    "The harbour office opens at six, but nobody comes before the fog has lifted. Two women carry the scales out "
    "to the quay and set them level with a wedge of slate. When the first boat ties up, the older one weighs the "
    "boxes and the younger one writes, and between them they have not lost a kilo in eleven years.",
    "To clean a clock of this kind, take off the back plate first and put the screws into a saucer in the order "
    "in which they came out. The pivots want a drop of oil no larger than a pinhead. Too much of it gathers dust, "
    "and the dust wears a groove that no oil will mend.",
    "Before the bridge was built the post went round by the mill, which added an hour in summer and half a day in "
    "winter. The council argued about the cost for so long that the engineer died, and his nephew finished the "
    "drawings. He left out the towers, saved a third of the stone, and was never forgiven by the mason.",
    "Bread made with rye flour needs less kneading than people think. The dough stays sticky whatever you do, so "
    "wet your hands, shape it once, and leave it alone. If the crust cracks along the side, the oven was too hot "
    "at the start or the loaf had not rested long enough.",
    "A tree that stands alone grows wide, and one among others grows tall. Foresters use this when they plant: "
    "close rows at first, so that the stems are straight and lose their lower branches early, and then, every ten "
    "years or so, a thinning, in which the best trees are given light and the rest become fence posts and "
    "firewood.",
    "The committee met on Tuesday to talk about the library roof. Three offers had come in, none of them "
    "complete. The cheapest said nothing of the gutters, the second forgot the scaffolding, and the third was "
    "written in such small letters that the chairman sent it back and asked for another in print that a person "
    "could read.",
    "When water freezes in a crack it takes up more room than before, and pushes. One night does little. A "
    "hundred nights in a row will split a boulder, and the pieces roll down to join the others at the foot of the "
    "cliff, where the sea grinds them against each other until they are round.",
    "Our neighbour kept a diary of the weather in which there was only one word a day. Windy, it says for most of "
    "March. In the year when his daughter was born he wrote Fine on forty days that the newspapers call wet. We "
    "asked him about it once, and he said that a diary is not a barometer.",
)
"""Paragraphs written for this purpose, in no training set."""
