"""Questions to calibrate with where no file of questions is at hand: three of each of eight kinds."""

from __future__ import annotations

from ..prompts import Question

_TEXTS = {
    "writing": (
        "Write a short letter to a neighbour, asking them to water your plants while you are away for two weeks.",
        "Describe a small railway station on a rainy evening, so that the reader hears and smells it.",
        "Draft an announcement for the staff of a library that will close for repairs during the whole of August.",
    ),
    "roleplay": (
        "You are the captain of a sailing ship in 1790. Explain to a new sailor what his first week will be like.",
        "Play a patient gardening teacher. I say: my tomato plants have yellow leaves and I do not know why.",
        "Pretend to be the oldest tree of a forest and tell me what you have seen in the last two hundred years.",
    ),
    "reasoning": (
        "Anna is taller than Ben, Ben is taller than Carl, and Dora is shorter than Carl. Who is the second tallest?"
        " Explain step by step.",
        "A farmer has to bring a goat, a wolf and a cabbage over a river in a boat that carries only one of them."
        " How does he do it?",
        "Every clock in a house shows another time. How could one find out which of them is right?",
    ),
    "math": (
        "A shop sells pens at 3 for 2 euros and notebooks at 1.50 euros each. What do 12 pens and 4 notebooks cost?",
        "A train leaves at 9:40 and arrives at 13:05 after 246 kilometres. What was its average speed?",
        "The sides of a rectangle are 7 and 24 centimetres long. Find its area, its perimeter and its diagonal.",
    ),
    "coding": (
        "Write a Python function that returns the longest common prefix of a list of strings, and explain it.",
        "Write an SQL query that lists the five customers with the highest sum of orders in the last year.",
        "Implement a stack with push, pop and min in constant time in Java, with a short comment for every method.",
    ),
    "extraction": (
        "From the sentence 'On 3 May 2019 Maria Lopez sold her house in Porto for 210,000 euros to Jan Novak',"
        " list date, seller, buyer, place and price as JSON.",
        "Name all animals in this text, one a line: 'The dog slept while two sparrows stole crumbs from the cat, and"
        " behind the fence a horse was watching the geese.'",
        "Turn this into a table with the columns city and temperature: Oslo had 4 degrees, Rome 17, Cairo 25 and"
        " Reykjavik only 1.",
    ),
    "stem": (
        "Explain to a ten-year-old, step by step, how a bicycle stays upright while it is moving.",
        "Summarize how vaccines train the immune system, and why some of them need a second dose.",
        "What is the difference between nuclear fission and nuclear fusion, and which of them powers the sun?",
    ),
    "humanities": (
        "List the main causes of the fall of the Western Roman Empire, with one sentence about each.",
        "What are the advantages and disadvantages of working from home? Give a balanced answer and a recommendation.",
        "Compare the ideas of Plato and Aristotle about what makes a good government.",
    ),
}

OWN_QUESTIONS = tuple(
    Question(f"{category}-{number}", category, (text,))
    for category, texts in _TEXTS.items()
    for number, text in enumerate(texts, start=1)
)
