"""Tools people expect, with the ways people ask for them; all are seen in training."""

# ruff: noqa: E501 (tables of sentences)

from . import pools
from .tools import KINDS, Kind, MadeTool, Parameter, choice, short_text, time

BY_KEY = {key: kind for kind in reversed(KINDS) for key in kind.keys}
OWN = {
    "to": BY_KEY["city"],
    "from_city": BY_KEY["city"],
    "word": Kind(("word",), "string", pools.word, ("{}",), ("The word",)),
    "item": Kind(("item",), "string", choice(*pools.OBJECTS, *pools.FOODS), ("{}",), ("The item", "Name of the item")),
    "artist": Kind(
        ("artist",), "string", lambda r: pools.proper(r, pools.NAMES, 0.5), ("by {}",), ("Name of the artist",)
    ),
    "symbol": Kind(("symbol",), "string", lambda r: pools.scramble(r, 2, 4).upper(), ("{}",), ("Ticker symbol",)),
    "note": Kind(("note",), "string", short_text, ("{}",), ("The text to save",)),
    "people": Kind(("people",), "integer", lambda r: r.randint(1, 12), ("for {} people",), ("Number of guests",)),
    "degrees": Kind(("degrees",), "integer", lambda r: r.randint(5, 35), ("to {} degrees",), ("Degrees Celsius",)),
    "dollars": Kind(("dollars",), "integer", lambda r: r.randint(1, 5000), ("{} dollars",), ("Amount in dollars",)),
    "order_id": Kind(("order_id",), "integer", lambda r: r.randint(100, 99999), ("{}",), ("Number of the order",)),
    "alarm_time": Kind(("alarm_time",), "string", time, ("at {}",), ("When the alarm rings",)),
    "a": Kind(("a",), "integer", lambda r: r.randint(0, 9999), ("{}",), ("First number",)),
    "b": Kind(("b",), "integer", lambda r: r.randint(0, 9999), ("{}",), ("Second number",)),
}


def known(name: str, description: str, keys: str, *requests: str) -> MadeTool:
    """A tool with fixed requests."""
    parameters = tuple(Parameter(key, OWN.get(key) or BY_KEY[key]) for key in keys.split())
    verb, _, thing = name.partition("_")
    return MadeTool(name, description, verb, thing.replace("_", " "), parameters, requests)


KNOWN_TOOLS = (
    known("get_weather", "Get the weather of a city", "city", "[What is|What's|How is|How's|Tell me|Check] the weather [like |]in {city}[ today| now| right now|]?",
          "[Is it|Will it be] [raining|sunny|cold|warm|snowing|windy] in {city}[ today| tomorrow|]?", "[Do I need|Should I take] an umbrella in {city}?", "Weather in {city}", "How [warm|cold|hot] is it in {city}?", "[Give me|Show me|I want] the [weather|forecast|weather forecast] for {city}."),
    known("get_current_weather", "Get the current weather in a given location", "location", "[What is|What's|How is|Tell me] the [current |]weather [like |]in {location}[ today| now| right now|]?", "Weather for {location}", "[Is it|Will it be] [raining|sunny|cold|warm] in {location}?"),
    known("get_weather", "Current weather", "city unit", "What is the weather in {city} in {unit}?", "[How warm|How cold|How hot] is it in {city}[,| in] {unit}?", "[Tell me|Give me] the temperature in {city} in {unit}."),
    known("get_time", "Get the current time in a city", "city", "What time is it in {city}[ now|]?", "[Tell me|Give me|What is] the [local |current |]time in {city}.", "How late is it in {city}?", "Time in {city}"),
    known("set_alarm", "Set an alarm clock", "alarm_time", "Wake me [up |]at {alarm_time}.", "[Set|Make|Create] an alarm [for|at] {alarm_time}.", "[I need|I want|I have] to [get up|wake up] at {alarm_time}."),
    known("set_timer", "Start a timer", "minutes", "[Set|Start] a timer [for|of] {minutes} minutes.", "Start a {minutes} minute timer.", "Timer {minutes} minutes", "Remind me in {minutes} minutes.", "Count down {minutes} minutes."),
    known("send_message", "Send a text message to a person", "recipient text", "[Send|Write] {recipient} a message [that says|saying] {text}.", "Text {recipient}: {text}", "[Tell|Message] {recipient} [that |]{text}.", "Send a message to {recipient}: {text}"),
    known("call_person", "Call a person by phone", "name", "[Call|Phone|Ring] {name}[ for me| now|].", "I want to [talk to|speak with|call] {name}."),
    known("translate", "Translate a word into another language", "word language", "Translate {word} [into|to] {language}.", "[How do you say|What is] {word} in {language}?", "[Say|Write] {word} in {language}."),
    known("define_word", "Look up the meaning of a word", "word", "What does {word} mean?", "[Define|Explain] [the word |]{word}.", "[What is the|Look up the|Tell me the] [meaning|definition] of {word}."),
    known("add_to_list", "Add an item to the shopping list", "item", "[Put|Add] {item} [on|to] [my|the] shopping list.", "[I need to buy|We need|Remember to buy] {item}."),
    known("set_light", "Change the brightness of a light", "room level", "[Set|Dim|Change] the {room} light to {level} percent.", "[Dim|Set|Put] the light in the {room} to {level}."),
    known("switch_light", "Turn a light on or off", "room state", "Turn the {room} light {state}.", "[Switch|Turn] {state} the light in the {room}.", "{room} light {state}"),
    known("set_volume", "Set the volume", "level", "[Set|Change|Turn] the volume to {level}[ percent|].", "Volume {level}", "Make it [louder|quieter], {level} percent."),
    known("play_music", "Play music of an artist", "artist", "Play [some music|something|songs|music] [by|of|from] {artist}.", "I want to hear [songs of|music by|something from] {artist}."),
    known("book_table", "Reserve a table in a restaurant", "people day", "[Reserve|Book] a table for {people} [people |]on {day}.", "We are {people} and want to eat out on {day}."),
    known("book_flight", "Book a flight between two cities", "from_city to", "Book [me |]a flight from {from_city} to {to}.", "I [need|want] [a plane ticket|to fly|a flight] from {from_city} to {to}.", "Fly me from {from_city} to {to}."),
    known("find_hotel", "Find a hotel in a city", "city", "[Find|Search|Look for] a hotel in {city}.", "Where can I [sleep|stay] in {city}?", "I need a [room|hotel|bed] in {city}."),
    known("find_train", "Find a train between two cities", "from_city to", "[Find|Look for] a train from {from_city} to {to}.", "Which trains go from {from_city} to {to}?", "I want to take the train from {from_city} to {to}."),
    known("get_distance", "Get the distance between two cities", "from_city to", "How far is it from {from_city} to {to}?", "[What is|Tell me] the distance [between|from] {from_city} [and|to] {to}?"),
    known("convert_money", "Convert dollars to euros", "dollars", "Convert {dollars} dollars to euros.", "How many euros are {dollars} dollars?", "What is {dollars} dollars in euros?"),
    known("send_money", "Send money to a person", "recipient dollars", "[Send|Transfer] {dollars} dollars to {recipient}.", "Pay {recipient} {dollars} dollars."),
    known("track_order", "Find out where an order is", "order_id", "Where is [my |]order {order_id}?", "Track [my |]order {order_id}.", "When does order {order_id} arrive?"),
    known("cancel_order", "Cancel an order", "order_id", "Cancel [my |]order [number |]{order_id}.", "I do not want order {order_id} any more."),
    known("get_stock_price", "Get the price of a stock", "symbol", "What is the stock price of {symbol}?", "How is {symbol} [stock |]doing?", "[Price of|Quote for] {symbol} stock"),
    known("add_event", "Add an event to the calendar", "title day", "[Add|Put] {title} [to|in|into] my calendar [on|for] {day}."),
    known("list_events", "List the events of a day", "day", "What is on my calendar on {day}?", "[Show|List|Tell me] my [events|meetings|plans] [for|on] {day}.", "What do I have on {day}?"),
    known("get_recipe", "Get a recipe for a food", "food", "How do I [make|cook] {food}?", "[Give me|Find|Show me] a recipe for {food}.", "I want to cook {food}."),
    known("order_food", "Order food", "food quantity", "Order {quantity} portions of {food}.", "I want to order {food}, {quantity} times.", "{quantity} times {food}, please"),
    known("set_temperature", "Set the temperature of a room", "room degrees", "Set the [temperature|heating] in the {room} to {degrees} degrees.", "[Heat|Warm|Cool] the {room} to {degrees} degrees.", "I want {degrees} degrees in the {room}."),
    known("get_news", "Get the latest news on a topic", "topic", "[What is|What's|Show me|Tell me|Get] the [latest |]news [on|about] {topic}?", "News about {topic}", "What is new [in|about] {topic}?"),
    known("search_web", "Search the web", "query", "[Search|Google|Look on|Search on] the [web|internet] for {query}.", "[Search|Look up|Find] {query} [on the web|online|on the internet].", "Search for {query}"),
    known("take_note", "Save a note", "note", "[Take a note|Note|Write down|Make a note|Save a note]: {note}", "[Write down|Note] that {note}."),
    known("calculate_sum", "Add two numbers with a calculator", "a b", "[Use the calculator|Use the tool|With the tool]: {a} plus {b}", "Calculate {a} + {b} with the [tool|calculator]."),
    known("roll_dice", "Roll a die", "", "Roll [a die|the dice|a dice|the die].", "[Throw|Roll] the dice for me."),
    known("get_date", "Get today's date", "", "What is today's date?", "Which date is it today?", "What day is it today?"),
)  # fmt: skip
