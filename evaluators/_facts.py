"""Closed-book facts: the end of a sentence that only what the weights remember can tell, among others of its kind."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

from evaluators._choices import Cluster, Item

CHOICES = 8

# Capitals that their countries do not name, and that have not moved or been disputed for a generation.
_CAPITALS = """
Afghanistan Kabul, Albania Tirana, Angola Luanda, Argentina Buenos_Aires, Armenia Yerevan, Australia Canberra, Austria
Vienna, Azerbaijan Baku, Bahrain Manama, Bangladesh Dhaka, Belarus Minsk, Belgium Brussels, Botswana Gaborone,
Bulgaria Sofia, Cambodia Phnom_Penh, Cameroon Yaounde, Canada Ottawa, Chad N'Djamena, Chile Santiago, China Beijing,
Colombia Bogota, Croatia Zagreb, Cuba Havana, Cyprus Nicosia, Denmark Copenhagen, Ecuador Quito, Egypt Cairo, Eritrea
Asmara, Estonia Tallinn, Ethiopia Addis_Ababa, Fiji Suva, Finland Helsinki, France Paris, Gabon Libreville, Georgia
Tbilisi, Germany Berlin, Ghana Accra, Greece Athens, Guinea Conakry, Haiti Port-au-Prince, Honduras Tegucigalpa,
Hungary Budapest, Iceland Reykjavik, India New_Delhi, Iran Tehran, Iraq Baghdad, Ireland Dublin, Italy Rome, Jamaica
Kingston, Japan Tokyo, Jordan Amman, Kenya Nairobi, Kyrgyzstan Bishkek, Laos Vientiane, Latvia Riga, Lebanon Beirut,
Liberia Monrovia, Libya Tripoli, Lithuania Vilnius, Madagascar Antananarivo, Malawi Lilongwe, Malaysia Kuala_Lumpur,
Mali Bamako, Malta Valletta, Mauritania Nouakchott, Mauritius Port_Louis, Moldova Chisinau, Mongolia Ulaanbaatar,
Montenegro Podgorica, Morocco Rabat, Mozambique Maputo, Namibia Windhoek, Nepal Kathmandu, Nicaragua Managua, Niger
Niamey, Nigeria Abuja, Norway Oslo, Oman Muscat, Pakistan Islamabad, Paraguay Asuncion, Peru Lima, Poland Warsaw,
Portugal Lisbon, Qatar Doha, Romania Bucharest, Russia Moscow, Rwanda Kigali, Samoa Apia, Senegal Dakar, Serbia
Belgrade, Slovakia Bratislava, Slovenia Ljubljana, Somalia Mogadishu, Spain Madrid, Sudan Khartoum, Sweden Stockholm,
Syria Damascus, Thailand Bangkok, Togo Lome, Turkey Ankara, Uganda Kampala, Ukraine Kyiv, Uruguay Montevideo,
Uzbekistan Tashkent, Venezuela Caracas, Vietnam Hanoi, Zambia Lusaka, Zimbabwe Harare
"""
_SYMBOLS = """
hydrogen H, helium He, lithium Li, beryllium Be, boron B, carbon C, nitrogen N, oxygen O, fluorine F, neon Ne, sodium
Na, magnesium Mg, aluminium Al, silicon Si, phosphorus P, sulfur S, chlorine Cl, argon Ar, potassium K, calcium Ca,
scandium Sc, titanium Ti, vanadium V, chromium Cr, manganese Mn, iron Fe, cobalt Co, nickel Ni, copper Cu, zinc Zn,
gallium Ga, germanium Ge, arsenic As, selenium Se, bromine Br, krypton Kr, rubidium Rb, strontium Sr, yttrium Y,
zirconium Zr, niobium Nb, molybdenum Mo, rhodium Rh, palladium Pd, silver Ag, cadmium Cd, indium In, tin Sn, antimony
Sb, iodine I, xenon Xe, caesium Cs, barium Ba, tungsten W, osmium Os, iridium Ir, platinum Pt, gold Au, mercury Hg,
thallium Tl, lead Pb, bismuth Bi, radon Rn, radium Ra, uranium U, plutonium Pu
"""
_AUTHORS = """
Hamlet William_Shakespeare, Don_Quixote Miguel_de_Cervantes, War_and_Peace Leo_Tolstoy, Crime_and_Punishment
Fyodor_Dostoevsky, Pride_and_Prejudice Jane_Austen, Oliver_Twist Charles_Dickens, Moby-Dick Herman_Melville,
The_Scarlet_Letter Nathaniel_Hawthorne, Jane_Eyre Charlotte_Bronte, Wuthering_Heights Emily_Bronte, Frankenstein
Mary_Shelley, Dracula Bram_Stoker, Treasure_Island Robert_Louis_Stevenson, The_Jungle_Book Rudyard_Kipling,
The_Time_Machine H._G._Wells, Around_the_World_in_Eighty_Days Jules_Verne, Les_Miserables Victor_Hugo, Madame_Bovary
Gustave_Flaubert, The_Three_Musketeers Alexandre_Dumas, Candide Voltaire, Faust Johann_Wolfgang_von_Goethe,
The_Metamorphosis Franz_Kafka, The_Magic_Mountain Thomas_Mann, Siddhartha Hermann_Hesse, Ulysses James_Joyce,
Animal_Farm George_Orwell, Brave_New_World Aldous_Huxley, Lord_of_the_Flies William_Golding, The_Hobbit
J._R._R._Tolkien, The_Great_Gatsby F._Scott_Fitzgerald, The_Old_Man_and_the_Sea Ernest_Hemingway, The_Grapes_of_Wrath
John_Steinbeck, To_Kill_a_Mockingbird Harper_Lee, The_Catcher_in_the_Rye J._D._Salinger, Fahrenheit_451 Ray_Bradbury,
Foundation Isaac_Asimov, Dune Frank_Herbert, Slaughterhouse-Five Kurt_Vonnegut, One_Hundred_Years_of_Solitude
Gabriel_Garcia_Marquez, The_Little_Prince Antoine_de_Saint-Exupery, The_Stranger Albert_Camus, Lolita
Vladimir_Nabokov, Doctor_Zhivago Boris_Pasternak, Things_Fall_Apart Chinua_Achebe, Beloved Toni_Morrison,
The_Handmaid's_Tale Margaret_Atwood, Walden Henry_David_Thoreau, Leaves_of_Grass Walt_Whitman, Paradise_Lost
John_Milton, The_Canterbury_Tales Geoffrey_Chaucer, The_Divine_Comedy Dante, The_Decameron Boccaccio, The_Odyssey
Homer, The_Aeneid Virgil, The_Republic Plato, Gulliver's_Travels Jonathan_Swift, Robinson_Crusoe Daniel_Defoe,
A_Doll's_House Henrik_Ibsen, The_Cherry_Orchard Anton_Chekhov, Waiting_for_Godot Samuel_Beckett, Death_of_a_Salesman
Arthur_Miller, A_Streetcar_Named_Desire Tennessee_Williams, On_the_Road Jack_Kerouac, The_Picture_of_Dorian_Gray
Oscar_Wilde, Middlemarch George_Eliot, Alice's_Adventures_in_Wonderland Lewis_Carroll
"""

RELATIONS: Mapping[str, tuple[str, str]] = {
    "capitals": ("The capital of {} is", _CAPITALS),
    "symbols": ("The chemical symbol for {} is", _SYMBOLS),
    "authors": ("The author of {} is", _AUTHORS),
}
"""Relation → a sentence without its end, and pairs of what stands in it and what ends it."""


def pairs(relation: str) -> dict[str, str]:
    """Subject → answer, of which no two are equal.

    >>> pairs("capitals")["Malaysia"]
    'Kuala Lumpur'
    """
    _, table = RELATIONS[relation]
    found = (pair.split() for pair in table.split(","))
    return {subject.replace("_", " "): answer.replace("_", " ") for subject, answer in found}


def clusters() -> Iterator[Cluster]:
    """One item per fact, the wrong answers drawn from the relation's other ones; in a random order."""
    found = []
    for relation, (sentence, _) in RELATIONS.items():
        known = pairs(relation)
        for subject, answer in known.items():
            others = sorted(set(known.values()) - {answer})
            wrong = random.Random(f"facts {relation} {subject}").sample(others, CHOICES - 1)
            choices = tuple(f" {name}" for name in (answer, *wrong))
            found.append(Cluster(subject.replace(" ", "_"), relation, (Item(sentence.format(subject), choices),)))
    random.Random(0).shuffle(found)
    yield from found
