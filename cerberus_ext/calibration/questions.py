"""Conversations to calibrate with where no file of questions is at hand: three of each of eight kinds.

What a text is worth to drafts depends on what it is about, and on how much of it has been said before: answers that
are long, and second turns, which mostly want something done with the first answer, repeat more than short first ones.
So all have two turns, some bring a text along, and they are asked for in equal shares of each kind.
"""

from __future__ import annotations

from ..io.prompts import Question

_TEXTS = {
    "writing": (
        (
            "Write a letter to a neighbour, asking them to water your plants while you are away for two weeks.",
            "Rewrite the letter so that it is half as long and sounds more formal.",
        ),
        (
            "Describe a small railway station on a rainy evening, so that the reader hears and smells it.",
            "Now tell the same in the present tense, as seen by the stationmaster.",
        ),
        (
            "Draft an announcement for the staff of a library that will close for repairs during the whole of August.",
            "Add a list of questions that readers may have about it, each with its answer.",
        ),
    ),
    "roleplay": (
        (
            "You are the captain of a sailing ship in 1790. Explain to a new sailor what his first week will be like.",
            "Captain, I am afraid of storms. What am I to do when one comes?",
        ),
        (
            "Play a patient gardening teacher. I say: my tomato plants have yellow leaves and I do not know why.",
            "I water them every evening and they stand in the shade of a wall. What should I change first?",
        ),
        (
            "Pretend to be the guide of a small museum of clocks, and welcome a school class that is a little bored.",
            "A pupil asks: why do clocks need to tick at all? Stay in your role.",
        ),
    ),
    "reasoning": (
        (
            "Anna is taller than Ben, Ben is taller than Carl, and Dora is shorter than Carl. Who is the second"
            " tallest? Explain step by step.",
            "Eva is taller than Ben, but shorter than Anna. Who is the second tallest now, and why?",
        ),
        (
            "A farmer has to bring a goat, a wolf and a cabbage over a river in a boat that carries only one of them."
            " How does he do it?",
            "Would it be easier if the boat carried two of them? List all crossings for that case.",
        ),
        (
            "Every clock in a house shows another time. How could one find out which of them is right?",
            "Which of these ways would still work without leaving the house or asking anybody?",
        ),
    ),
    "math": (
        (
            "A shop sells pens at 3 for 2 euros and notebooks at 1.50 euros each. What do 12 pens and 4 notebooks"
            " cost?",
            "There is a discount of 10 percent on everything above 10 euros. What does the customer pay then?",
        ),
        (
            "A train leaves at 9:40 and arrives at 13:05 after 246 kilometres. What was its average speed?",
            "It stopped for 25 minutes on the way. What was its average speed while it was moving?",
        ),
        (
            "The sides of a rectangle are 7 and 24 centimetres long. Find its area, its perimeter and its diagonal.",
            "Do the same for a rectangle whose sides are twice as long, and compare the results.",
        ),
    ),
    "coding": (
        (
            "Write a Python class for a bank account with methods to deposit, to withdraw and to print the balance.",
            "Add an error for withdrawals above the balance, and write three tests for the class.",
        ),
        (
            "Write an SQL query that lists the five customers with the highest sum of orders in the last year.",
            "Change the query so that it shows each customer's number of orders, too, and explain every line.",
        ),
        (
            "Implement a stack with push, pop and min in constant time in Java, with a comment for every method.",
            "Translate your code to Python and keep the comments.",
        ),
    ),
    "extraction": (
        (
            "List date, seller, buyer, place and price of every sale in this text as JSON: 'On 3 May 2019 Maria Lopez"
            " sold her house in Porto for 210,000 euros to Jan Novak. Two years later, on 12 June 2021, Jan Novak sold"
            " it to Emma Berg for 265,000 euros. Emma Berg also bought a garden in Braga from Rui Costa on 1 July"
            " 2021, for 18,500 euros.'",
            "Now as a table with one line for each sale, sorted by price.",
        ),
        (
            "Name all animals in this text, one a line, and where each of them is: 'The dog slept on the porch while"
            " two sparrows stole crumbs from the cat under the table. Behind the fence a horse was watching the geese"
            " on the pond, and a fox was watching them all from the edge of the wood.'",
            "Which of these animals can fly, and which of them live in a house? Make two lists.",
        ),
        (
            "Turn this into a table with the columns city, morning and noon: In the morning Oslo had 4 degrees, Rome"
            " 17, Cairo 25 and Reykjavik only 1. At noon it was 9 in Oslo, 24 in Rome, 33 in Cairo and 3 in"
            " Reykjavik.",
            "Add a column with the difference between noon and morning, and name the city where it is largest.",
        ),
    ),
    "stem": (
        (
            "Explain to a ten-year-old, step by step, how a bicycle stays upright while it is moving.",
            "Explain the same to a student of physics.",
        ),
        (
            "Summarize how vaccines train the immune system, and why some of them need a second dose.",
            "What are the most common misunderstandings about this? Give five, and correct each of them.",
        ),
        (
            "What is the difference between nuclear fission and nuclear fusion, and which of them powers the sun?",
            "Compare them as proposers of electricity: fuel, waste, risks and the state of the technology.",
        ),
    ),
    "humanities": (
        (
            "List the main causes of the fall of the Western Roman Empire, with one sentence about each.",
            "Which of these causes do historians disagree about most? Explain both sides.",
        ),
        (
            "What are the advantages and disadvantages of working from home? Give a balanced answer.",
            "Turn your answer into a recommendation for a company with fifty employees.",
        ),
        (
            "Compare the ideas of Plato and Aristotle about what makes a good government.",
            "Write a short dialogue in which the two of them argue about this.",
        ),
    ),
}

OWN_QUESTIONS = tuple(
    Question(f"{category}-{number}", category, turns)
    for category, texts in _TEXTS.items()
    for number, turns in enumerate(texts, start=1)
)
