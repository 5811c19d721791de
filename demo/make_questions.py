"""Questions on short invented passages: what the demo trains and tests on.

    python demo/make_questions.py [FOLDER]    writes train.jsonl and test.jsonl there (default: data/demo/questions)

A line is a question on a town, its answer, and four passages on that town, of which one holds the answer: the form of
the lost-in-the-middle files, which `prepare --task multidoc_qa` reads. Training and test share no town and no kind of
fact, so a gain on the test is no answer learned by heart.
"""

import json
import pathlib
import random
import sys

# title, passage, question; the answers
# fmt: off
TRAIN = [
    ("bakery", "The bakery in {town} opens at six. People come from far away for its {answer}.",
     "What do people come to the bakery in {town} for?",
     ["honey rolls", "plum cake", "rye bread", "almond buns", "cheese pies", "pretzels"]),
    ("lighthouse", "The lighthouse of {town} stands on a rock. It was built of {answer} after a hard winter.",
     "What was the lighthouse of {town} built of?",
     ["grey stone", "red brick", "black slate", "white marble", "old timber", "iron"]),
    ("museum", "The museum of {town} has three small rooms. The oldest thing in it is a {answer}.",
     "What is the oldest thing in the museum of {town}?",
     ["copper mask", "glass bowl", "silver spoon", "wooden flute", "clay lamp", "fishing net"]),
    ("festival", "In summer {town} holds a festival. The children race {answer} down the main street.",
     "What do children race at the festival in {town}?",
     ["geese", "barrels", "goats", "kites", "wheelbarrows", "paper boats"]),
    ("painter", "The painter of {town} is shy and lives alone. Most of her pictures show {answer}.",
     "What do most pictures by the painter of {town} show?",
     ["steam trains", "apple trees", "market days", "sleeping cats", "stormy skies", "windmills"]),
    ("bridge", "The bridge at {town} is narrow and very old. Whoever crosses it must pay {answer}.",
     "What must one pay to cross the bridge at {town}?",
     ["two eggs", "one penny", "three coins", "a feather", "a button", "five nuts"]),
    ("sailor", "The sailor from {town} went to sea at twelve. He always takes along his {answer}.",
     "What does the sailor from {town} always take along?",
     ["parrot", "violin", "chess board", "pillow", "telescope", "teapot"]),
    ("school", "The school of {town} has forty pupils. On Fridays everyone there learns {answer}.",
     "What does everyone learn on Fridays at the school of {town}?",
     ["juggling", "beekeeping", "swimming", "weaving", "astronomy", "singing"]),
]
TEST = [
    ("inn", "The inn at {town} has nine beds and a stable. Its cook serves {answer} to every guest.",
     "What does the cook of the inn at {town} serve?",
     ["mushroom soup", "baked trout", "lentil stew", "roast duck", "onion tart", "pancakes"]),
    ("inventor", "The inventor in {town} works in a cellar. He became rich with a new kind of {answer}.",
     "What did the inventor in {town} become rich with?",
     ["umbrella", "lamp", "bicycle", "clock", "pencil", "saddle"]),
    ("market", "The market of {town} is held under a glass roof. Most of its stalls sell {answer}.",
     "What do most stalls at the market of {town} sell?",
     ["carpets", "pottery", "spices", "candles", "leather boots", "baskets"]),
    ("farm", "The farm near {town} belongs to two sisters. On its largest field they grow {answer}.",
     "What do the sisters grow on the farm near {town}?",
     ["pumpkins", "barley", "strawberries", "cabbage", "sunflowers", "hops"]),
    ("theatre", "The theatre of {town} has no roof. When it rains the actors hand out {answer}.",
     "What do the actors hand out at the theatre of {town}?",
     ["blankets", "straw hats", "raincoats", "hot tea", "sweets", "towels"]),
    ("king", "The king of {town} ruled for a year. He is remembered because he was afraid of {answer}.",
     "What was the king of {town} afraid of?",
     ["spiders", "thunder", "mirrors", "horses", "deep water", "ghosts"]),
]
# fmt: on
FIRST = "Bel Cor Dun Fen Gal Hol Jar Kel Lor Mar Nor Ost Pel Quin Ras Sel Tor Ul Ver Wil Yar Zel".split()  # noqa: SIM905
LAST = "wick mere holt ford stead brook ham ley moor gate ton dale".split()  # noqa: SIM905


def make_row(town, kinds, draw):
    """-> a row on `town`: four of the kinds of fact, the first of them asked for."""
    passages, asked = [], draw.sample(kinds, 4)
    for number, (title, passage, question, answers) in enumerate(asked):
        answer = draw.choice(answers)
        passages.append({"title": title, "text": passage.format(town=town, answer=answer), "isgold": number == 0})
        if number == 0:
            row = {"question": question.format(town=town), "answers": [answer.removeprefix("a ")]}
    return row | {"ctxs": passages}


def main(folder):
    draw = random.Random(0)
    towns = [first + last for first in FIRST for last in LAST]
    draw.shuffle(towns)
    folder.mkdir(parents=True, exist_ok=True)
    for name, kinds, some in (("train", TRAIN, towns[:104]), ("test", TEST, towns[104:])):
        rows = (make_row(town, kinds, draw) for town in some)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "data/demo/questions"))
