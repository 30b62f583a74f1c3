"""Prompts for training heads of a chat model, of the kinds that people ask: templates, filled with topics.

    python bench/training_prompts.py --count 4000 --seed 1 > prompts.jsonl
    cerberus train --prompts prompts.jsonl --output my-heads

A model's own prompts (what `cerberus train` takes without --prompts) keep to few subjects. Heads see only as much of
the vocabulary as the answers hold, so subjects are what counts here, not how well a question is put. No question of
a benchmark is among them.
"""

from __future__ import annotations

import argparse
import json
import random

TOPICS = """
the water cycle; a lost umbrella; medieval castles; electric bicycles; the stock market; beekeeping; photosynthesis;
the French Revolution; a lighthouse keeper; machine translation; sourdough bread; volcanoes; the Silk Road; chess
openings; solar panels; a haunted library; the human heart; train travel in winter; inflation; black holes; a shy
dragon; tea ceremonies; the printing press; coral reefs; remote work; jazz; vaccines; the Great Wall of China; a robot
gardener; public libraries; plate tectonics; a small-town bakery; cryptography; the Amazon rainforest; marathon
training; the Renaissance; earthquakes; a detective in Venice; recycling; quantum computers; sleep; the Roman Empire;
a talking cat; city parks; antibiotics; origami; the theory of evolution; a broken clock; urban farming; DNA; space
telescopes; the history of the bicycle; a stormy sea voyage; mental arithmetic; climate change; a secret recipe;
wolves; the Industrial Revolution; video games; a mountain rescue; nuclear energy; the Olympic Games; a violin maker;
online privacy; penguins; the Cold War; gravity; a midnight train; meditation; desert plants; supply and demand; an
old photograph; neural networks; the moon landing; a family reunion; rice farming; glaciers; the Ottoman Empire; a
street musician; wind turbines; dinosaurs; sign language; a chess prodigy; the immune system; hurricanes; the
invention of the telephone; a ghost ship; electric cars; Greek mythology; kidney function; a rainy afternoon; coffee;
the Mongol Empire; 3D printing; the aurora borealis; a stubborn donkey; opera; unemployment; whales; the periodic
table; an abandoned amusement park; football tactics; the Black Death; bridges; a time traveller; database indexes;
honey; Mars; the Aztecs; a wedding speech; migration of birds; carbon dioxide; a new neighbour; Shakespeare's
comedies; batteries; tigers; the United Nations; an interview with a baker; hydropower; the ear; a lost dog; credit
cards; rivers; the Vikings; satellites; a school play; allergies; elections; the invention of paper; a magic
paintbrush; microchips; fungi; Antarctica; stage fright; public transport; the Suez Canal; a broken promise;
probability; elephants; the Great Depression; perfume; lasers; knitting; insulin; an island without maps; the Ming
dynasty; tides; a first day at work; open-source software; comets; school lunches
"""

FACTS = """
Maria sold 14 cakes on Monday, twice as many on Tuesday, but three came back | how many did she sell in the end;
A train leaves at 9:40 and arrives at 13:15 with a stop of 25 minutes | how long was it moving;
A garden is 12 metres long and 7.5 metres wide | what are its area and its perimeter;
A jacket costs 80 dollars and is reduced by 15 percent, then by another 10 percent | what is the final price;
Three friends share a bill of 96 euros, and one pays half | how much do the other two pay each;
A tank holds 450 litres and loses 3 litres every 4 minutes | after how long is it empty;
The sum of two numbers is 58 and their difference is 12 | what are the numbers;
A class has 30 students and 60 percent of them play an instrument | how many do not;
A car uses 6.2 litres of petrol for 100 kilometres | how much does it need for 340 kilometres;
A rectangle has the same area as a square with sides of 6 cm and is 9 cm long | how wide is it;
Tom is four times as old as his son, and in 20 years he will be twice as old | how old are they now;
A bag has 5 red, 3 blue and 2 green marbles | what is the probability of drawing two red ones in a row;
A shop buys pens for 0.40 dollars and sells them for 0.65 dollars | how many must it sell to earn 50 dollars;
A wheel has a radius of 35 cm | how many turns does it make over one kilometre
"""

PEOPLE = """
a medieval blacksmith; a strict but kind teacher; a sea captain; a sceptical scientist; a cheerful robot; an old
farmer; a detective; a travel guide in Lisbon; a chef; a football coach; an astronaut on her first mission; a
librarian; a wizard's apprentice; a doctor; a Roman senator; a museum guard; a stand-up comedian; a mountain guide; a
beekeeper; a medieval queen; an economist; a tired parent
"""

CODE = """
counts the vowels in a string; finds the two largest numbers in a list; checks whether a number is prime; reverses the
words of a sentence; merges two sorted lists; removes duplicates from a list but keeps the order; converts Roman
numerals to integers; computes the factorial of n recursively; reads a CSV file and prints the average of a column;
finds the most frequent word in a text; implements a stack with push, pop and peek; checks whether brackets are
balanced; sorts a list of dictionaries by a key; computes the greatest common divisor; transposes a matrix; flattens a
nested list; generates the first n Fibonacci numbers; validates an e-mail address; counts the days between two dates;
searches a sorted array with binary search; finds all anagrams in a list of words; rotates a list by k places; prints
a multiplication table; converts Celsius to Fahrenheit; walks a binary tree in order; finds the shortest path in a
grid; compresses a string by counting runs; rolls two dice a thousand times; groups words by their first letter; finds
the missing number in 1 to n; draws a triangle of stars; caches the results of a function
"""

LANGUAGES = "Python; JavaScript; C++; Java; Python; Go; Ruby; Python"

# By kind, one a line.
TEMPLATES = {
    "writing": """
Write a short story about {topic}.
Write a poem about {topic} with four stanzas.
Draft a friendly e-mail about {topic}.
Write the opening paragraph of a novel about {topic}.
Write a persuasive speech about {topic}.
Write a blog post about {topic} for a general audience.
Describe {topic} so vividly that a reader can see it.
Write a newspaper headline and a first paragraph about {topic}.
Write a product description inspired by {topic}.
Compose a letter to a friend about {topic}.
Write a dialogue between two people who disagree about {topic}.
Rewrite this sentence in a formal style: I was really surprised by how cool {topic} turned out to be.
""",
    "roleplay": """
Pretend you are {person}. Tell me what you think about {topic}.
Act as {person} and give me advice about {topic}.
You are {person}. A child asks you about {topic}. What do you answer?
Imagine you are {person} and describe your day.
Take the role of {person} who is being interviewed about {topic}.
Speak as {person}: why does {topic} matter to you?
""",
    "reasoning": """
What would happen if {topic} disappeared tomorrow? Think step by step.
Compare {topic} and {other}. What do they have in common?
Is it reasonable to worry about {topic}? Give reasons for both sides.
Which is more important, {topic} or {other}? Explain.
Someone claims that {topic} caused {other}. How would you check that?
List three common mistakes in thinking about {topic}.
If all experts on {topic} like {other}, and Anna does not like {other}, is Anna an expert on {topic}? Explain.
""",
    "math": """
{fact}. {Question}?
{fact}. Explain step by step {question}.
Solve this problem and show your work: {fact}; {question}?
Solve for x: {a}x + {b} = {c}.
What is {a} * {c} - {b}? Show the steps.
What is {b} percent of {c}0?
Find the next two numbers: {a}, {a2}, {a4}, {a8}, ...
Simplify ({a}x + {b}) - ({b}x - {c}).
""",
    "coding": """
Write a {language} function that {code}.
Write a {language} program that {code}, and explain how it works.
Implement something in {language} that {code}. Add comments.
How would you test a {language} function that {code}?
I am learning {language}. Show me code that {code}.
Give two ways in {language} to write code that {code}, and compare them.
Explain the algorithm of a program that {code}, then give the code in {language}.
""",
    "extraction": """
Make a table with three facts about {topic} and {other}.
List the key points about {topic} as JSON with the fields name and value.
Give five keywords for an article about {topic}, in order of importance.
Name ten things related to {topic}.
Summarize in two sentences what everyone should know about {topic}.
Make a list of questions and answers about {topic}.
Rate each from 1 to 10 for a beginner and give one reason: {topic}, {other}, {third}. Answer as a list.
Put these in alphabetical order and describe each in a few words: {topic}; {other}; {third}.
""",
    "stem": """
Explain {topic} to a high-school student.
What are the main ideas behind {topic}?
How does one measure something about {topic}?
Describe an experiment about {topic}.
What are the causes and the effects of {topic}?
What are recent developments in {topic}?
Explain how {topic} and {other} are related from a scientific point of view.
Design a small project about {topic} for students.
""",
    "humanities": """
What is the history of {topic}?
How has {topic} influenced culture and society?
Discuss the ethics of {topic}.
Write an essay outline about {topic}.
What can we learn from {topic} today?
Explain the economics of {topic}.
What arguments do people make for and against {topic}?
Suggest three books or films about {topic} and say why.
Give advice to someone who wants to learn about {topic}.
Create a lesson plan about {topic}.
""",
}


def items(text: str) -> list[str]:
    return [" ".join(item.split()) for item in text.split(";")]


def prompts(count: int, seed: int) -> list[dict[str, str]]:
    """`count` different prompts, about as many of each kind. Raises ValueError when there are not that many."""
    topics, facts, people, code, languages = (items(text) for text in (TOPICS, FACTS, PEOPLE, CODE, LANGUAGES))
    random_ = random.Random(seed)
    found: dict[str, str] = {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        kind = random_.choice(list(TEMPLATES))
        topic, other, third = random_.sample(topics, 3)
        fact, question = random_.choice(facts).split(" | ")
        a, b, c = random_.randint(2, 12), random_.randint(2, 40), random_.randint(10, 99)
        text = random_.choice(TEMPLATES[kind].strip().splitlines()).format(
            topic=topic, other=other, third=third, fact=fact, question=question, Question=question.capitalize(),
            person=random_.choice(people), code=random_.choice(code), language=random_.choice(languages),
            a=a, b=b, c=c, a2=2 * a, a4=4 * a, a8=8 * a,
        )  # fmt: skip
        found.setdefault(text, kind)
    if len(found) < count:
        raise ValueError(f"count must be at most about {len(found)}, got {count}")
    return [{"prompt": text, "category": kind} for text, kind in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for prompt in prompts(arguments.count, arguments.seed):
        print(json.dumps(prompt))


if __name__ == "__main__":
    main()
