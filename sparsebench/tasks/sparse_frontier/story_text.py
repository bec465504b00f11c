"""The words of the story tasks: places, people, events, items, and sentences with fields to fill.

The released code's own sentences are not copied; how many there are of each kind is kept. Fields: ``hero``, ``person``,
``place``, ``event``, ``item`` (bought in the chapter), ``old`` (bought before, now sold).
"""

LOCATIONS = (
    "Alexandria Antioch Argos Athens Babylon Byblos Byzantium Carthage Chalcis Cnidus Colchis Corinth Croton "
    "Cumae Cyrene Damascus Delos Delphi Dodona Edessa Elea Eleusis Emesa Ephesus Epidaurus Eretria Gades Gaza "
    "Gortyn Halicarnassus Hatra Heraclea Iconium Jericho Kition Knossos Lagash Larissa Magnesia Massalia Megara "
    "Memphis Messene Miletus Mycenae Naxos Nineveh Olympia Palmyra Paphos Pella Pergamon Petra Priene Rhodes "
    "Samos Sardis Selinus Smyrna Sparta Syracuse Tarsus Thebes Tyre"
).split()
CHARACTERS = (
    "Agathon Aeson Althea Anaxis Briseis Callias Calypso Charis Cleon Daphne Demetra Dion Doris Elpis Erasmus "
    "Eudora Evander Galen Halia Hector Helena Hermia Iason Ione Iris Kallisto Kimon Leander Leda Leon Lycus "
    "Lysander Melina Melos Nereus Nikias Nestor Orestes Pallas Penelope Phaedra Phoebe Pyrrhus Rhea Selene Solon "
    "Thalia Theron Xenia"
).split()
ADJECTIVES = (
    "ancient broken carved cracked curved dusty engraved faded gilded heavy hollow narrow painted polished rough "
    "slender tiny twisted"
).split()
MATERIALS = "amber bone brass bronze cedar clay copper ebony glass gold iron ivory jade marble silver".split()
TYPES = (
    "amulet bell bowl box bracelet brooch buckle chalice comb compass dagger figurine flute goblet lamp locket "
    "mask mirror pendant ring spoon"
).split()
EVENTS = """a boat race in the harbour
a contest of poets
a council of the elders
a festival of lanterns
a great fair of horses
a meeting of the potters
a parade of the guard
a public debate on taxes
a quarrel over a fallen wall
a race around the old walls
a sale of captured ships
a trial in the market square
a wedding of two great houses
a wrestling match
an eclipse of the sun
an exhibition of maps
the arrival of a grain fleet
the first day of the harvest
the opening of a new theatre
the visit of a foreign king""".splitlines()

INTRODUCTIONS = """{hero} came to {place} on a grey morning.
At noon {hero} walked through the gates of {place}.
After many days on the road {hero} saw the roofs of {place}.
It was late when {hero} arrived in {place}.
A small boat carried {hero} to {place}.
With a caravan of traders {hero} entered {place}.
The wind was cold on the day {hero} reached {place}.
The streets of {place} were already busy when {hero} came.
Tired but content, {hero} stopped in {place}.
On the next leg of the journey {hero} visited {place}.""".splitlines()
REASONS = """A letter from an old friend was the reason for the trip.
Nothing but curiosity had led the way there.
There was a debt to be paid in that town.
The doctor had advised a change of air.
A rumour about cheap bread was reason enough to go.
The other roads were closed after the storm.
A dream had shown those streets the night before.
A promise made long ago had to be kept.
The horses needed rest and there was a good stable.
It was said that the springs there cure any cough.""".splitlines()
HAPPENINGS = """On that day the town was busy with {event}.
Everybody was talking about {event}.
The main square was full because of {event}.
The inns had no beds left because of {event}.
From afar one could hear {event}.
Children ran ahead to see {event}.
The talk of the morning was {event}.
A crier announced {event} at every corner.
All work had stopped for {event}.
By chance this was the hour of {event}.""".splitlines()
ENCOUNTERS = """In the crowd {hero} met {person}.
Near the fountain {person} was waiting.
{person} called from a window and came down.
At the baths {hero} sat down beside {person}.
A dog barked, and behind it came {person}.
Under the arcade {hero} recognised {person}.
{person} was standing in front of a bakery.
On the stairs of the temple {hero} ran into {person}.
A boy led {hero} to the house of {person}.
It was {person} who first raised a hand in greeting.""".splitlines()
CONVERSATIONS = """They spoke about the price of olives.
They compared the wines of two valleys.
They argued about the right way to bake flat bread.
They laughed about a goat that had eaten a contract.
They remembered the dry summer of years before.
They wondered whether the bridge would ever be built.
They agreed that the new tax was too high.
They talked about a play that nobody had understood.
They counted the ships that had not come back.
They praised the shade of the plane trees.
They traded stories about bad innkeepers.
They asked each other about their families.
They could not agree on the age of the city wall.
They discussed how to keep mice out of a barn.
They shared a plate of figs and said little.
They guessed what the weather would bring.
They spoke of a healer who used only honey.
They complained about the noise of the smiths.
They admired a mosaic with a fish in it.
They talked about the shortest way across the hills.
They discussed a riddle about three brothers.
They mentioned a cousin who had gone to sea.
They spoke about the stars that sailors use.
They regretted that the old library was closed.
They made plans for a garden with bees.
They talked about a lost letter and its seal.
They spoke about the habits of storks.
They joked about the hat of the magistrate.
They recalled a song from their school days.
They considered whether donkeys are wiser than horses.""".splitlines()
PURCHASES = """Before long {hero} bought the {item} from {person}.
For a few coins {person} let {hero} have the {item}.
After some bargaining {hero} acquired the {item} from {person}.
{person} opened a bag, and {hero} bought the {item} at once.
Without asking for the price {hero} purchased the {item} from {person}.
{hero} paid {person} in silver for the {item}.
In the end {hero} took home the {item}, bought from {person}.
{person} sold {hero} the {item} that had lain on a shelf for years.
The {item} changed hands: {person} got the money and {hero} the goods.""".splitlines()
SALES = """There {hero} also sold the {old} to a passing trader.
The {old} was sold on the same afternoon.
A collector gave {hero} a fair sum for the {old}.
To travel lighter, {hero} parted with the {old} for money.
{hero} sold the {old} without regret.""".splitlines()
FAREWELLS = """Then {hero} and {person} said goodbye.
{person} wished {hero} a safe road.
They parted as friends do, without many words.
With a bow {person} disappeared into a side street.
{person} waved until {hero} was out of sight.
They promised to write to each other.
{person} had to leave before the evening bell.
They embraced and went their own ways.
A servant came to fetch {person} home.
They parted at the gate and did not look back.""".splitlines()
CONCLUSIONS = """In the evening {hero} wrote a few lines in a notebook.
That night {hero} slept without dreams.
The road went on, and so did {hero}.
By sunset the roofs were far behind.
The lamps were lit as {hero} packed the saddlebags.
It had been a day worth remembering.
Soon {hero} was looking for the next ferry.
The moon rose over the hills, and {hero} walked on.
A light rain fell as {hero} left.
There was still a long way to go.""".splitlines()
EXTRAS = """Somewhere a rooster crowed at the wrong hour.
The smell of fresh bread hung over the roofs.
A cat watched all of it from a wall.
The fountain had been dry for a week.
Swallows were building nests under the eaves.
An old man was mending nets by the road.
Two children fought over a wooden horse.
The bell of the harbour rang twice.
Dust lay on the leaves of the fig trees.
A cart with melons blocked the street.""".splitlines()
