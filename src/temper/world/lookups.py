"""What can be known about people and places: each relation with its values and every sentence that asks for it or states it. Floor 1.

All text about a relation is in its entry: questions (those with "~" are held out of demonstrations and training prompts), statements
(clauses, so that they also fit after "I think"), what is asked in indirect speech, and a verb phrase for summaries.
"""

from __future__ import annotations

from typing import NamedTuple

PEOPLE = [
    "Ada", "Alba", "Arlo", "Bela", "Bram", "Bren", "Cass", "Cleo", "Cora", "Dara", "Dell", "Edda", "Elin", "Emil", "Enzo", "Faye",
    "Finn", "Gus", "Hale", "Hana", "Hugo", "Ida", "Ines", "Ivo", "Jana", "Jon", "Juno", "Kai", "Kit", "Kora", "Lars", "Lena", "Levi",
    "Lona", "Mara", "Milo", "Mina", "Nell", "Niko", "Nora", "Odo", "Olin", "Otto", "Pia", "Quin", "Remy", "Rosa", "Runa", "Seth", "Sila",
    "Tavi", "Tess", "Tobin", "Una", "Vera", "Wim", "Yara", "Zeno", "Zora", "Ulf",
]  # fmt: skip

PLACES = [
    "the Anchor Inn", "the Crown Inn", "the Barrel Inn", "the Star Inn", "the North Tower", "the South Tower", "the Clock Tower",
    "the Water Mill", "the Wind Mill", "the Corn Mill", "the Fish Market", "the Wool Market", "the Apple Market", "the Grain Store",
    "the Oil Store", "the Net Store", "the Stone Bridge", "the Iron Bridge", "the East Gate", "the West Gate",
]  # fmt: skip

DISHES = [
    "plum cake", "eel pie", "crab soup", "bean stew", "fried cod", "rye bread", "goat cheese", "onion tart", "leek broth", "pear jam",
    "roast duck", "oat porridge",
]  # fmt: skip


class Relation(NamedTuple):
    of: str  # "person" or "place"
    values: list[str]
    questions: list[str]
    statements: list[str]
    indirect: list[str]
    verb: list[str]
    shared: str  # "both ...", for comparisons; empty: not compared


RELATIONS: dict[str, Relation] = {
    "trade": Relation(
        "person",
        ["baker", "cooper", "smith", "tailor", "fisher", "weaver", "miller", "potter", "carter", "painter", "healer", "piper"],
        [
            "What work does {person} do?",
            "What is the trade of {person}?",
            "Which trade does {person} have?",
            "Tell me what work {person} does.",
            "Do you know which trade {person} has?",
            "~How does {person} earn a living?",
            "~What does {person} work as?",
            "~I wonder what work {person} does.",
        ],
        [
            "{person} is a {trade}",
            "{person} works as a {trade}",
            "{person} earns a living as a {trade}",
            "the trade of {person} is that of a {trade}",
            "the work of {person} is that of a {trade}",
        ],
        ["what work {person} does", "which trade {person} has", "how {person} earns a living"],
        ["works as a {trade}"],
        "have the same trade",
    ),
    "street": Relation(
        "person",
        ["Rope Lane", "Salt Lane", "Gull Lane", "Tar Lane", "Kelp Lane", "Bell Row", "Fern Row", "Lime Row", "Sand Row", "Moss Row"],
        [
            "Where does {person} live?",
            "Which street does {person} live in?",
            "Where is the home of {person}?",
            "Tell me where {person} lives.",
            "Do you know which street {person} lives in?",
            "~Where can I find {person}?",
            "~In which street is the home of {person}?",
            "~I wonder where {person} lives.",
        ],
        [
            "{person} lives in {street}",
            "{person} has a home in {street}",
            "{person} can be found in {street}",
            "the home of {person} is in {street}",
            "the house of {person} stands in {street}",
        ],
        ["where {person} lives", "which street {person} lives in", "where the home of {person} is"],
        ["lives in {street}"],
        "live in the same street",
    ),
    "pet": Relation(
        "person",
        ["goat", "cat", "dog", "hen", "crow", "pig", "mule", "fox", "seal", "toad", "lamb", "goose"],
        [
            "What animal does {person} keep?",
            "What is the pet of {person}?",
            "Which pet does {person} have?",
            "Tell me what animal {person} keeps.",
            "Do you know which pet {person} has?",
            "~Which animal lives with {person}?",
            "~What kind of pet does {person} own?",
            "~I wonder what animal {person} keeps.",
        ],
        [
            "{person} keeps a {pet}",
            "{person} has a {pet} at home",
            "{person} owns a {pet}",
            "the pet of {person} is a {pet}",
            "the animal that {person} keeps is a {pet}",
        ],
        ["what animal {person} keeps", "which pet {person} has", "what pet lives with {person}"],
        ["keeps a {pet}"],
        "keep the same pet",
    ),
    "dish": Relation(
        "person",
        DISHES,
        [
            "What does {person} like to eat?",
            "What is the favourite dish of {person}?",
            "Which dish does {person} like best?",
            "Tell me what {person} likes to eat.",
            "Do you know which dish {person} likes best?",
            "~What does {person} want for supper?",
            "~Which food does {person} love?",
            "~I wonder what {person} likes to eat.",
        ],
        [
            "{person} likes to eat {dish}",
            "{person} likes {dish} best",
            "{person} loves {dish}",
            "{person} wants {dish} for supper",
            "the favourite dish of {person} is {dish}",
        ],
        ["what {person} likes to eat", "which dish {person} likes best", "what food {person} loves"],
        ["likes {dish}"],
        "like the same dish",
    ),
    "boat": Relation(
        "person",
        ["Swift", "Heron", "Plover", "Petrel", "Dolphin", "Otter", "Comet", "Harvest", "Beacon", "Falcon", "Thistle", "Rover"],
        [
            "Which boat does {person} sail?",
            "What is the boat of {person} called?",
            "Which boat does {person} own?",
            "Tell me which boat {person} sails.",
            "Do you know which boat {person} owns?",
            "~What boat does {person} take to sea?",
            "~What is the name of the boat of {person}?",
            "~I wonder which boat {person} sails.",
        ],
        [
            "{person} sails the {boat}",
            "{person} owns the {boat}",
            "{person} takes the {boat} to sea",
            "the boat of {person} is the {boat}",
            "the boat of {person} is called the {boat}",
        ],
        ["which boat {person} sails", "which boat {person} owns", "what the boat of {person} is called"],
        ["sails the {boat}"],
        "sail the same boat",
    ),
    "keeper": Relation(
        "place",
        PEOPLE,
        [
            "Who keeps {place}?",
            "Who is the keeper of {place}?",
            "Who looks after {place}?",
            "Tell me who keeps {place}.",
            "Do you know who looks after {place}?",
            "~Which person keeps {place}?",
            "~Who has the keys of {place}?",
            "~I wonder who keeps {place}.",
        ],
        [
            "{place} is kept by {person}",
            "{place} is looked after by {person}",
            "{place} is in the care of {person}",
            "the keeper of {place} is {person}",
            "the keys of {place} are with {person}",
        ],
        ["who keeps {place}", "who looks after {place}", "who the keeper of {place} is"],
        ["is kept by {person}"],
        "",
    ),
    "colour": Relation(
        "place",
        ["red", "blue", "green", "white", "black", "grey", "yellow", "brown"],
        [
            "What colour is {place}?",
            "What is the colour of {place}?",
            "Which colour is {place} painted?",
            "Tell me what colour {place} is.",
            "Do you know which colour {place} has?",
            "~In which colour did they paint {place}?",
            "~What colour are the walls of {place}?",
            "~I wonder what colour {place} is.",
        ],
        [
            "{place} is {colour}",
            "{place} is painted {colour}",
            "{place} has {colour} walls",
            "the colour of {place} is {colour}",
            "the walls of {place} are {colour}",
        ],
        ["what colour {place} is", "which colour {place} has", "what the colour of {place} is"],
        ["is painted {colour}"],
        "have the same colour",
    ),
    "day": Relation(
        "place",
        ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
        [
            "When is {place} closed?",
            "On which day is {place} closed?",
            "Which day is the rest day of {place}?",
            "Tell me when {place} is closed.",
            "Do you know on which day {place} is closed?",
            "~What day does {place} rest?",
            "~On what day is no one at {place}?",
            "~I wonder when {place} is closed.",
        ],
        [
            "{place} is closed on {day}",
            "{place} rests on {day}",
            "{place} shuts on {day}",
            "the rest day of {place} is {day}",
            "the doors of {place} are shut on {day}",
        ],
        ["when {place} is closed", "on which day {place} is closed", "which day the rest day of {place} is"],
        ["is closed on {day}"],
        "rest on the same day",
    ),
}

VOCABULARY: dict[str, list[str]] = {
    "person": PEOPLE,
    "place": PLACES,
    "entity": PEOPLE + PLACES,
    **{name: relation.values for name, relation in RELATIONS.items() if name != "keeper"},
}


def frames() -> dict[str, list[str]]:
    """Frames of every relation r: r (a clause), q_r (a question), k_r (an indirect question), v_r (a verb phrase), same_r and both_r
    (comparisons), q2_r (a question over two hops: "the keeper of a place" in the person's place)."""
    out: dict[str, list[str]] = {}
    for name, relation in RELATIONS.items():
        slot = "{" + relation.of + "}"
        other = "{" + relation.of + "2}"
        out[name] = relation.statements
        out[f"q_{name}"] = relation.questions
        out[f"k_{name}"] = relation.indirect
        out[f"v_{name}"] = relation.verb
        if relation.of == "person":
            out[f"q2_{name}"] = [question.replace(slot, "the keeper of {place}") for question in relation.questions]
        if relation.shared:
            out[f"same_{name}"] = [
                f"Do {slot} and {other} {relation.shared}?",
                f"Is it true that {slot} and {other} {relation.shared}?",
                f"Tell me whether {slot} and {other} {relation.shared}.",
                f"~Would you say that {slot} and {other} {relation.shared}?",
                f"~I wonder whether {slot} and {other} {relation.shared}.",
            ]
            out[f"both_{name}"] = [f"{slot} and {other} {relation.shared}"]
            out[f"differ_{name}"] = [f"{slot} and {other} do not {relation.shared}"]
    return out


def groups() -> dict[str, list[str]]:
    names = list(RELATIONS)
    return {
        "clause": names,
        "known": [f"k_{name}" for name in names],
        "verb": [f"v_{name}" for name in names],
        "alike": [f"{kind}_{name}" for kind in ("both", "differ") for name in names if RELATIONS[name].shared],
    }


QUESTIONS = [f"q_{name}" for name in RELATIONS]
TWO_HOPS = [f"q2_{name}" for name, relation in RELATIONS.items() if relation.of == "person"]
COMPARISONS = [f"same_{name}" for name, relation in RELATIONS.items() if relation.shared]
