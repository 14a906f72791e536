"""Closed facts: capitals, symbols, opposites, plurals, past tenses, a few translations. A score here is recall."""

# ruff: noqa: E501 (tables of sentences)

from dataclasses import dataclass

from ..phrases import Frames, Speaker
from .example import Draft

FAMILY = "fact"


def pair(text: str) -> tuple[str, str]:
    """``"a=b"`` to a and b."""
    left, right = text.strip().split("=")
    return left, right


def pairs(text: str) -> tuple[tuple[str, str], ...]:
    """``"a=b, c=d"`` to pairs."""
    return tuple(pair(each) for each in text.replace("\n", " ").split(","))


CAPITALS = pairs(
    """France=Paris, Germany=Berlin, Italy=Rome, Spain=Madrid, Austria=Vienna, Norway=Oslo, Portugal=Lisbon, Ireland=Dublin,
    Greece=Athens, Poland=Warsaw, Japan=Tokyo, Egypt=Cairo, Peru=Lima, Canada=Ottawa, Australia=Canberra, India=New Delhi,
    China=Beijing, Russia=Moscow, Sweden=Stockholm, Finland=Helsinki, Denmark=Copenhagen, Hungary=Budapest, Romania=Bucharest,
    Bulgaria=Sofia, Turkey=Ankara, Iran=Tehran, Iraq=Baghdad, Kenya=Nairobi, Ghana=Accra, Cuba=Havana, Chile=Santiago,
    Colombia=Bogota, Argentina=Buenos Aires, Brazil=Brasilia, Mexico=Mexico City, Thailand=Bangkok, Vietnam=Hanoi,
    Nepal=Kathmandu, Iceland=Reykjavik, Belgium=Brussels, Croatia=Zagreb, Serbia=Belgrade, Ukraine=Kyiv, Morocco=Rabat,
    Tunisia=Tunis, Ethiopia=Addis Ababa, Jordan=Amman, Lebanon=Beirut, Qatar=Doha, Mongolia=Ulaanbaatar,
    South Korea=Seoul, Indonesia=Jakarta, the Philippines=Manila, Switzerland=Bern, the Netherlands=Amsterdam,
    the United Kingdom=London, England=London, the United States=Washington, New Zealand=Wellington, Pakistan=Islamabad,
    Czechia=Prague, Slovakia=Bratislava, Slovenia=Ljubljana, Estonia=Tallinn, Latvia=Riga, Lithuania=Vilnius, Nigeria=Abuja,
    Saudi Arabia=Riyadh, Venezuela=Caracas, Uruguay=Montevideo, Ecuador=Quito, Algeria=Algiers"""
)
SYMBOLS = pairs(
    """hydrogen=H, helium=He, lithium=Li, carbon=C, nitrogen=N, oxygen=O, fluorine=F, neon=Ne, sodium=Na, magnesium=Mg,
    aluminum=Al, silicon=Si, phosphorus=P, sulfur=S, chlorine=Cl, argon=Ar, potassium=K, calcium=Ca, iron=Fe, copper=Cu,
    zinc=Zn, silver=Ag, tin=Sn, gold=Au, mercury=Hg, lead=Pb, uranium=U, nickel=Ni, cobalt=Co, iodine=I, platinum=Pt"""
)
OPPOSITES = pairs(
    """hot=cold, big=small, fast=slow, tall=short, happy=sad, rich=poor, light=dark, young=old, hard=soft, full=empty,
    open=closed, early=late, strong=weak, wet=dry, clean=dirty, loud=quiet, high=low, good=bad, near=far, thick=thin,
    wide=narrow, deep=shallow, easy=difficult, cheap=expensive, true=false, left=right, up=down, day=night, inside=outside,
    first=last, start=end, buy=sell, win=lose, love=hate, push=pull, heavy=light, sweet=sour, sharp=blunt, brave=afraid,
    safe=dangerous"""
)
PLURALS = pairs(
    """mouse=mice, child=children, man=men, woman=women, foot=feet, tooth=teeth, goose=geese, person=people, leaf=leaves,
    knife=knives, wolf=wolves, city=cities, box=boxes, bus=buses, sheep=sheep, fish=fish, ox=oxen, baby=babies, half=halves,
    potato=potatoes, dog=dogs, cat=cats, house=houses, book=books, key=keys, boy=boys, wife=wives, hero=heroes"""
)
PAST = pairs(
    """go=went, see=saw, eat=ate, run=ran, take=took, give=gave, come=came, know=knew, think=thought, find=found, buy=bought,
    bring=brought, teach=taught, write=wrote, read=read, speak=spoke, break=broke, drive=drove, fly=flew, sing=sang,
    swim=swam, sleep=slept, feel=felt, keep=kept, leave=left, make=made, say=said, tell=told, win=won, lose=lost, walk=walked,
    play=played, work=worked, begin=began, drink=drank, fall=fell, grow=grew, hear=heard, build=built, sit=sat"""
)
TRANSLATIONS = {
    "German": pairs("dog=Hund, cat=Katze, house=Haus, water=Wasser, bread=Brot, tree=Baum, sun=Sonne, moon=Mond, book=Buch, friend=Freund, day=Tag, night=Nacht, hello=hallo, thank you=danke, yes=ja, no=nein, red=rot, milk=Milch, child=Kind, city=Stadt"),
    "French": pairs("dog=chien, cat=chat, house=maison, water=eau, bread=pain, tree=arbre, sun=soleil, moon=lune, book=livre, friend=ami, day=jour, night=nuit, hello=bonjour, thank you=merci, yes=oui, no=non, red=rouge, milk=lait, child=enfant, city=ville"),
    "Spanish": pairs("dog=perro, cat=gato, house=casa, water=agua, bread=pan, tree=árbol, sun=sol, moon=luna, book=libro, friend=amigo, day=día, night=noche, hello=hola, thank you=gracias, yes=sí, no=no, red=rojo, milk=leche, child=niño, city=ciudad"),
}  # fmt: skip
LEGS = pairs(
    "spider=8, dog=4, bird=2, ant=6, cat=4, horse=4, bee=6, human=2, chicken=2, crab=10, snake=0, cow=4, fly=6, duck=2, frog=4, lion=4"
)
MISCELLANEOUS = (
    (Frames(("How many days are in a week?", "How many days does a week have?"), ("How many days [has|make|are there in] [a|one] week?",)), "7"),
    (Frames(("How many months are in a year?", "How many months does a year have?"), ("How many months [has|make|are there in] [a|one] year?",)), "12"),
    (Frames(("How many hours are in a day?", "How many hours does a day have?"), ("How many hours [has|make|are there in] [a|one] day?",)), "24"),
    (Frames(("How many minutes are in an hour?",), ("How many minutes [has|make|are there in|does] [an|one] hour[ have|]?",)), "60"),
    (Frames(("How many letters are in the alphabet?",), ("How many letters [has|are there in|does] the [English |]alphabet[ have|]?",)), "26"),
    (Frames(("What color is the sky?",), ("[What|Which] [color|colour] [has|is] the [sky|clear sky]?",)), "blue"),
    (Frames(("What color is grass?",), ("[What|Which] [color|colour] [has|is] [the |]grass?",)), "green"),
    (Frames(("What color is snow?",), ("[What|Which] [color|colour] [has|is] [the |]snow?",)), "white"),
    (Frames(("What planet do we live on?",), ("[Which|What] planet do [we|people|humans] live on?", "[On which|On what] planet do we live?")), "Earth"),
    (Frames(("What is the largest planet?",), ("[Which|What] [is the [largest|biggest] planet|planet is the [largest|biggest]]?",)), "Jupiter"),
    (Frames(("What is the largest ocean?",), ("[Which|What] [is the [largest|biggest] ocean|ocean is the [largest|biggest]]?",)), "the Pacific Ocean"),
    (Frames(("How many continents are there?",), ("[How many|What number of] continents [are there|exist|does the Earth have]?",)), "7"),
    (Frames(("At what temperature does water boil?",), ("[At what|At which] temperature [does water boil|is water boiling]?",)), "100 degrees Celsius"),
    (Frames(("At what temperature does water freeze?",), ("[At what|At which] temperature [does water freeze|does water turn to ice]?",)), "0 degrees Celsius"),
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table of facts with the frames that ask for the right side (``forward``) and for the left side (``backward``)."""

    name: str
    rows: tuple[tuple[str, str], ...]
    forward: Frames
    backward: Frames | None = None


TABLES = (
    Table("capital", CAPITALS,
          Frames(("What is the capital of {x}?", "Name the capital of {x}.", "Which city is the capital of {x}?", "capital of {x}", "What's the capital of {x}?", "Tell me the capital city of {x}."),
                 ("[Tell me|Give me|Name|Say|Do you know|Can you tell me] the [capital|capital city] of {x}.", "[Which|What] [city|town] is the capital [city |]of {x}?", "[What is|What's] {x}'s capital[ city|]?", "{x}: [what is the capital|which capital|capital]?", "[Which|What] capital [does {x} have|has {x}|belongs to {x}]?", "[I am going to|I am travelling to|I live in] {x}. What is the capital?")),
          Frames(("Which country has the capital {y}?", "{y} is the capital of which country?", "What country is {y} the capital of?"),
                 ("[Of which country|Of what country] is {y} the capital?", "[Tell me|Name|Say] the country [with|whose capital is|that has] {y}[ as its capital| as capital].", "[Which|What] country's capital is {y}?", "{y} is the [capital|capital city] of [what|which] [country|land]?"))),
    Table("symbol", SYMBOLS,
          Frames(("What is the symbol of {x}?", "What is the chemical symbol for {x}?", "What is the symbol for {x}?"),
                 ("[Tell me|Give me|Name|Say] the [chemical |]symbol [of|for] {x}.", "[Which|What] [chemical |]symbol [does {x} have|has {x}|stands for {x}|is used for {x}]?", "How is {x} written in chemistry?")),
          Frames(("Which element has the symbol {y}?", "What element is {y}?"), ("[Tell me|Name|Say] the element with the symbol {y}.", "{y} is the symbol of [what|which] element?", "[Which|What] element [does {y} stand for|is written {y}]?"))),
    Table("opposite", OPPOSITES,
          Frames(("What is the opposite of {x}?", "The opposite of {x}?", "opposite of {x}"),
                 ("[Tell me|Give me|Name|Say|Do you know] the opposite of {x}.", "[Which|What] [word |]is the opposite of {x}?", "[What|Which word] means the opposite of {x}?", "[Find|Give me|Tell me] [an antonym|the antonym] [of|for] {x}."))),
    Table("plural", PLURALS,
          Frames(("What is the plural of {x}?", "plural of {x}"),
                 ("[Tell me|Give me|Name|Say|Do you know] the plural [form |]of {x}.", "[Which|What] is the plural [form |]of {x}?", "One {x}, two [what|...]?", "[How do you say|What is] {x} in the plural?"))),
    Table("past", PAST,
          Frames(("What is the past tense of {x}?", "past tense of {x}"),
                 ("[Tell me|Give me|Name|Say|Do you know] the [past tense|past form|simple past] of {x}.", "[Which|What] is the [past tense|past form|simple past] of [the verb |to |]{x}?", "[How do you say|What is] {x} in the past[ tense|]?"))),
    Table("legs", LEGS,
          Frames(("How many legs does a {x} have?", "How many legs has a {x}?"),
                 ("[Tell me|Say|Do you know] how many legs a {x} has.", "[What is|Tell me] the number of legs of a {x}?", "On how many legs does a {x} walk?"))),
    *(Table(language, rows,
            Frames((f"What is {{x}} in {language}?", f"Translate {{x}} into {language}.", f"How do you say {{x}} in {language}?", f"Translate {{x}} to {language}."),
                   (f"[What is|What's] the {language} [word|translation] [for|of] {{x}}?", f"[Say|Write|Tell me|Give me] {{x}} in {language}.", f"[How do they|How does one|How would you] say {{x}} in {language}?", f"[{language} for|in {language}:|{language} word for] {{x}}")))
      for language, rows in TRANSLATIONS.items()),
)  # fmt: skip


def draft(speaker: Speaker) -> Draft:
    """A fact; the held-out operand is the pair of a fact and the words it is asked in."""
    rng = speaker.rng
    if rng.random() < 0.12:
        frames, answer = rng.choice(MISCELLANEOUS)
        return Draft("", speaker.say(frames), "a fact I know", answer)
    table = rng.choices(TABLES, [len(table.rows) for table in TABLES])[0]
    left, right = rng.choice(table.rows)
    frames, sought = table.forward, right
    if table.backward and rng.random() < 0.3 and sum(y == right for _, y in table.rows) == 1:
        frames, sought = table.backward, left
    question = speaker.say(frames, x=left, y=right)
    return Draft(f"{table.name}{left}{question}", question, f"{table.name}: {left}, {right}", sought)
