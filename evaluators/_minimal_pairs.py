"""Minimal pairs: a grammatical sentence and one that a single change makes ungrammatical, from templates.

The idea of judging a model by the probabilities of minimally different sentences is that of Warstadt et al.
2020, arXiv:1912.00582; templates and words here are our own. Every phenomenon draws its template and words at
random, so that clusters are independent draws from the same distribution. The two items of a cluster reverse
the change (what is right in one is wrong in the other, or right is the longer one once and the shorter one
once): whoever looks at the changed words alone, or prefers the shorter sentence, is right once in two.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping

from evaluators._choices import Cluster, Item

CLUSTERS = 6_000
_SEED = 20_260  # another one makes other sentences: raise the evaluator's version with it

# singular, plural
_PEOPLE = [
    (w, f"{w}s")
    for w in (
        "teacher doctor farmer painter lawyer singer driver sailor waiter neighbor student soldier writer dancer "
        "baker tailor guard nurse pilot judge visitor customer manager player worker reporter gardener clerk"
    ).split()
]
_THINGS = [
    (w, f"{w}s")
    for w in (
        "book letter picture house car song lamp garden drum window door chair table bottle ticket hat clock painting "
        "basket boat flower coat mirror blanket"
    ).split()
]
_MALE = "king boy uncle brother father prince husband grandfather gentleman actor".split()
_FEMALE = "queen girl aunt sister mother princess wife grandmother lady actress".split()
# third person, plural
_ACTIONS = [
    (f"{w}s", w)
    for w in "laugh sleep work sing dance smile run talk travel wait listen swim jump shout complain".split()
]
_FEELINGS = [(f"{w}s", w) for w in "admire help know like see follow visit trust fear hear remember avoid".split()]
_PAST = "admired helped followed visited trusted feared remembered avoided thanked blamed praised invited".split()
_WHOM = "admire help follow visit trust fear remember avoid".split()  # regular in the past
_HANDLED = "bought sold cleaned painted repaired opened dropped carried borrowed noticed moved wanted".split()
# past, participle
_IRREGULAR = [
    ("wrote", "written"),
    ("took", "taken"),
    ("stole", "stolen"),
    ("broke", "broken"),
    ("drew", "drawn"),
    ("chose", "chosen"),
    ("gave away", "given away"),
    ("threw away", "thrown away"),
    ("forgot", "forgotten"),
    ("hid", "hidden"),
]
_STRICT = "bought borrowed noticed wanted repaired carried damaged destroyed".split()  # never without an object
_INTRANSITIVE = "laughed slept smiled arrived vanished disappeared coughed sneezed existed yawned".split()
_PLACES = "near behind beside opposite".split()
_ADJECTIVES = "old new small large strange beautiful cheap heavy expensive famous".split()
# compared with an ending, and with "more"
_SHORT = "taller older younger stronger faster richer smaller thinner".split()
_LONG = "careful beautiful famous patient honest intelligent generous talented".split()
_PRONOUNS = [("him", "he"), ("her", "she"), ("them", "they"), ("me", "I"), ("us", "we")]

Draw = random.Random
Pair = tuple[str, str]


def _both(prefix: str, one: str, other: str, end: str, prefix2: str) -> list[Pair]:
    """The two numbers of one frame: `one` is right after `prefix`, `other` after `prefix2`."""
    return [(f"{prefix} {one}{end}", f"{prefix} {other}{end}"), (f"{prefix2} {other}{end}", f"{prefix2} {one}{end}")]


def _across_phrase(r: Draw) -> list[Pair]:
    (one, many), (near, nears), place = r.choice(_PEOPLE), r.choice(_PEOPLE + _THINGS), r.choice(_PLACES)
    acts, act = r.choice(_ACTIONS)
    return _both(f"The {one} {place} the {nears}", acts, act, ".", f"The {many} {place} the {near}")


def _across_subject_relative(r: Draw) -> list[Pair]:
    (one, many), (other, others) = r.sample(_PEOPLE, 2)
    (feels, feel), (acts, act) = r.choice(_FEELINGS), r.choice(_ACTIONS)
    return _both(f"The {one} that {feels} the {others}", acts, act, ".", f"The {many} that {feel} the {other}")


def _across_object_relative(r: Draw) -> list[Pair]:
    (one, many), (other, others) = r.sample(_PEOPLE, 2)
    (feels, feel), (acts, act) = r.choice(_FEELINGS), r.choice(_ACTIONS)
    return _both(f"The {one} that the {others} {feel}", acts, act, ".", f"The {many} that the {other} {feels}")


def _of_to_be(r: Draw) -> list[Pair]:
    (one, many), (near, nears), adjective = r.choice(_THINGS), r.choice(_PEOPLE), r.choice(_ADJECTIVES)
    here, gone = r.choice([("is", "are"), ("was", "were")])
    return _both(f"The {one} of the {nears}", here, gone, f" very {adjective}.", f"The {many} of the {near}")


def _of_coordination(r: Draw) -> list[Pair]:
    (one, _), (two, _) = r.sample(_PEOPLE, 2)
    acts, act = r.choice(_ACTIONS)
    tail = r.choice([" every day.", " all the time.", " in the evening."])
    return _both(f"The {one} with the {two}", acts, act, tail, f"The {one} and the {two}")


def _determiner(r: Draw) -> list[Pair]:
    (who, _), (one, many), did = r.choice(_PEOPLE), r.choice(_THINGS), r.choice(_HANDLED)
    this, these = r.choice([("this", "these"), ("that", "those")])
    return _both(f"The {who} {did} {this}", one, many, ".", f"The {who} {did} {these}")


def _determiner_across_adjective(r: Draw) -> list[Pair]:
    (who, _), (one, many), did = r.choice(_PEOPLE), r.choice(_THINGS), r.choice(_HANDLED)
    how, (this, these) = r.choice(_ADJECTIVES), r.choice([("this", "these"), ("that", "those")])
    return _both(f"The {who} {did} {this} {how}", one, many, ".", f"The {who} {did} {these} {how}")


def _reflexive_gender(r: Draw) -> list[Pair]:
    he, she, did = r.choice(_MALE), r.choice(_FEMALE), r.choice(_PAST)
    return _both(f"The {he} {did}", "himself", "herself", ".", f"The {she} {did}")


def _reflexive_number(r: Draw) -> list[Pair]:
    one, did, they = r.choice(_MALE), r.choice(_PAST), r.choice(_PEOPLE)[1]
    return _both(f"The {one} {did}", "himself", "themselves", ".", f"The {they} {did}")


def _reflexive_binding(r: Draw) -> list[Pair]:
    he, she, did = r.choice(_MALE), r.choice(_FEMALE), r.choice(_PAST)
    said = r.choice("said thought believed knew hoped".split())
    return _both(
        f"The {she} {said} that the {he} {did}", "himself", "herself", ".", f"The {he} {said} that the {she} {did}"
    )


def _irregular_past(r: Draw) -> list[Pair]:
    (who, _), (what, _), (past, participle) = r.choice(_PEOPLE), r.choice(_THINGS), r.choice(_IRREGULAR)
    return [
        (f"The {who} {past} the {what}.", f"The {who} {participle} the {what}."),
        (f"The {who} had {participle} the {what}.", f"The {who} had {past} the {what}."),
    ]


def _irregular_passive(r: Draw) -> list[Pair]:
    (who, _), (what, _), (past, participle) = r.choice(_PEOPLE), r.choice(_THINGS), r.choice(_IRREGULAR)
    acts = r.choice(_ACTIONS)[0]
    return [
        (f"The {what} was {participle} by the {who}.", f"The {what} was {past} by the {who}."),
        (f"The {who} that {past} the {what} {acts}.", f"The {who} that {participle} the {what} {acts}."),
    ]


def _verb_form(r: Draw) -> list[Pair]:
    (who, _), (whom, _), base = *r.sample(_PEOPLE, 2), r.choice(_WHOM)
    modal, done = r.choice("can must should might will would".split()), f"{base.removesuffix('e')}ed"
    return [
        (f"The {who} {modal} {base} the {whom}.", f"The {who} {modal} {done} the {whom}."),
        (f"The {who} has {done} the {whom}.", f"The {who} has {base} the {whom}."),
    ]


def _passive_of_intransitive(r: Draw) -> list[Pair]:
    (who, _), (by, _) = r.sample(_PEOPLE, 2)
    takes, bare = r.choice(_PAST), r.choice(_INTRANSITIVE)
    return [
        (f"The {who} was {takes} by the {by}.", f"The {who} was {bare} by the {by}."),
        (f"The {who} {bare}.", f"The {who} {takes}."),
    ]


def _causative(r: Draw) -> list[Pair]:
    (who, _), (what, _), when = r.choice(_PEOPLE), r.choice(_THINGS), r.choice(["", " yesterday", " again"])
    takes, bare = r.choice(_STRICT), r.choice(_INTRANSITIVE)
    return [
        (f"The {who} {takes} the {what}{when}.", f"The {who} {bare} the {what}{when}."),
        (f"The {who} {bare}{when}.", f"The {who} {takes}{when}."),
    ]


def _polarity(r: Draw) -> list[Pair]:
    (one, _), (whom, _), did = r.choice(_PEOPLE), r.choice(_PEOPLE), r.choice(_PAST)
    know = r.choice(["It is clear that", "Everybody knows that", "We are told that"])
    return [
        (f"{know} no {one} has ever {did} the {whom}.", f"{know} some {one} has ever {did} the {whom}."),
        (f"{know} some {one} has already {did} the {whom}.", f"{know} no {one} has already {did} the {whom}."),
    ]


def _gap(r: Draw) -> list[Pair]:
    (who, _), (what, _), did = r.choice(_PEOPLE), r.choice(_THINGS), r.choice(_HANDLED)
    ask = r.choice(["We know", "They remember", "The manager found out", "Everybody forgot"])
    return [
        (f"{ask} what the {who} {did} yesterday.", f"{ask} that the {who} {did} yesterday."),
        (f"{ask} that the {who} {did} the {what} yesterday.", f"{ask} what the {who} {did} the {what} yesterday."),
    ]


def _adjunct_island(r: Draw) -> list[Pair]:
    (who, _), (whom, _), (other, _) = r.sample(_PEOPLE, 3)
    first, then = r.choice(_FEELINGS)[1], r.choice("visiting calling meeting inviting thanking".split())
    when = r.choice(["before", "after"])
    who_did, did = f"Who did the {who} {first}", f"Did the {who} {first}"
    return [
        (f"{who_did} {when} {then} the {whom}?", f"{who_did} the {whom} {when} {then}?"),
        (f"{did} the {whom} {when} {then} the {other}?", f"{did} {when} {then} the {whom} the {other}?"),
    ]


def _existential(r: Draw) -> list[Pair]:
    (one, many), place, (what, _) = r.choice(_PEOPLE), r.choice(_PLACES), r.choice(_THINGS)
    return [
        (f"There was a {one} {place} the {what}.", f"There was every {one} {place} the {what}."),
        (f"There were several {many} {place} the {what}.", f"There were all {many} {place} the {what}."),
    ]


def _comparative(r: Draw) -> list[Pair]:
    (one, _), (two, _), short, long = *r.sample(_PEOPLE, 2), r.choice(_SHORT), r.choice(_LONG)
    return [
        (f"The {one} is much {short} than the {two}.", f"The {one} is much more {short} than the {two}."),
        (f"The {one} is much more {long} than the {two}.", f"The {one} is much {long} than the {two}."),
    ]


def _case(r: Draw) -> list[Pair]:
    (who, _), did, (him, he), then = r.choice(_PEOPLE), r.choice(_PAST), r.choice(_PRONOUNS), r.choice(_INTRANSITIVE)
    return [
        (f"The {who} {did} {him} yesterday.", f"The {who} {did} {he} yesterday."),
        (f"The {who} said that {he} {then}.", f"The {who} said that {him} {then}."),
    ]


PHENOMENA: Mapping[str, Callable[[Draw], list[Pair]]] = {
    "agreement.phrase": _across_phrase,
    "agreement.subject_relative": _across_subject_relative,
    "agreement.object_relative": _across_object_relative,
    "agreement.be": _of_to_be,
    "agreement.coordination": _of_coordination,
    "determiner.noun": _determiner,
    "determiner.adjective": _determiner_across_adjective,
    "anaphor.gender": _reflexive_gender,
    "anaphor.number": _reflexive_number,
    "anaphor.binding": _reflexive_binding,
    "irregular.past": _irregular_past,
    "irregular.passive": _irregular_passive,
    "verb_form": _verb_form,
    "arguments.passive": _passive_of_intransitive,
    "arguments.causative": _causative,
    "polarity": _polarity,
    "filler_gap": _gap,
    "island.adjunct": _adjunct_island,
    "existential": _existential,
    "comparative": _comparative,
    "case": _case,
}


def clusters(count: int = CLUSTERS, seed: int = _SEED) -> Iterator[Cluster]:
    """Two items each, the phenomenon drawn anew for every cluster: any part of the sequence is a fair sample."""
    draw, names = random.Random(seed), sorted(PHENOMENA)
    for number in range(count):
        name = draw.choice(names)
        pairs = PHENOMENA[name](draw)
        draw.shuffle(pairs)  # a cluster's first item must stand for both: plurals are easier than singulars
        yield Cluster(str(number), name, tuple(_item(good, bad) for good, bad in pairs))


def _item(good: str, bad: str) -> Item:
    """The shared first words as the prefix."""
    a, b = good.split(" "), bad.split(" ")
    shared = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
    assert shared, f"{good!r} and {bad!r} share no first word"
    return Item(" ".join(a[:shared]), (" " + " ".join(a[shared:]), " " + " ".join(b[shared:])))
