#!/usr/bin/env python3
"""Questions and preferences in a small child's words, to fine-tune weights/stories on.

    questions.py answers     --count 400 --seed 1 >train.jsonl     lines {"prompt", "answer"}, as messages with --messages
    questions.py preferences --count 400 --seed 1 >train.jsonl     lines {"prompt", "chosen", "rejected"}
    ... --held-out           of names and things that the others never have
"""
import argparse
import json
import random

SOUNDS = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "sheep": "baa", "pig": "oink", "lion": "roar",
          "bee": "buzz", "owl": "hoot", "mouse": "squeak", "frog": "ribbit", "bird": "tweet"}
COLOURS = {"sun": "yellow", "sky": "blue", "grass": "green", "snow": "white", "night": "black", "tree": "green"}
NAMES = [["Tom", "Lily", "Ben", "Mia", "Max", "Anna", "Sam", "Lucy"], ["Tim", "Sue", "Jack", "Amy"]]
TOYS = [["ball", "car", "doll", "boat", "book", "kite"], ["train", "bear"]]


def answer(r, names, toys):
    name = r.choice(names)
    if r.random() < 0.7:
        animal = r.choice(sorted(SOUNDS))
        question, reply = f"What does the {animal} say?", f"The {animal} says {SOUNDS[animal]}."
    else:
        thing = r.choice(sorted(COLOURS))
        question, reply = f"What color is the {thing}?", f"The {thing} is {COLOURS[thing]}."
    return {"prompt": f'{name} asked: "{question}" Mom said:', "answer": f' "{reply}"'}


def preference(r, names, toys):
    (a, b), toy = r.sample(names, 2), r.choice(toys)
    kind = [f'"You can play with my {toy}."', f'"Here is my {toy}. We can share it."', f'"Let us play with my {toy}, {b}!"']
    mean = [f'"You can not have my {toy}."', f'"Go away. The {toy} is mine."', f'"I do not want to share my {toy}, {b}!"']
    return {"prompt": f"{b} had no {toy} and was sad. {a} said:", "chosen": " " + r.choice(kind), "rejected": " " + r.choice(mean)}


def messages(line):
    return {"messages": [{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": line["answer"].strip()}]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["answers", "preferences"])
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--messages", action="store_true")
    a = parser.parse_args()
    r = random.Random(a.seed)
    for _ in range(a.count):
        line = (answer if a.kind == "answers" else preference)(r, NAMES[a.held_out], TOYS[a.held_out])
        print(json.dumps(messages(line) if a.messages else line))


if __name__ == "__main__":
    main()
