#!/usr/bin/env python3
"""The papers' synthetic tasks as lines {"prompt": [ids], "answer": [ids]} for `mamba train` and `mamba score`.

    tasks.py induction --length 256 --count 10000 --seed 1 >train.jsonl

induction   Mamba, section 4.1.2: a special token is followed by some token, once, at a random place; when the special
            token comes again, at the end, the answer is the token that followed it.  ids 0-14, special 15
copying     Mamba, section 4.1.1 (selective copying): 16 tokens at random places among noise; after them the answer is
            the 16 tokens in their order.  ids 0-13, noise 14, end of the input 15
parity      the sum of the bits modulo 2.  ids 0, 1, end 2
modulo3     the sum of the digits modulo 3.  ids 0-2, end 3
listops     Long Range Arena, section 2.1: nested lists of MAX, MIN, MED(ian), SM (sum modulo 10) over digits, at most
            10 deep, at most 10 members each; --length is the longest, a quarter of it the shortest.  ids 0-9 digits,
            10-13 [MAX [MIN [MED [SM, 14 ], end 15
"""
import argparse
import json
import random
import statistics
import sys


def induction(r, length):
    special = 15
    ids = [r.randrange(15) for _ in range(length)]
    place = r.randrange(length - 2)
    ids[place], ids[-1] = special, special
    return ids, [ids[place + 1]]


def copying(r, length, tokens=16):
    answer = [r.randrange(14) for _ in range(tokens)]
    ids = [14] * (length - 1)
    for place, token in zip(sorted(r.sample(range(length - 1), tokens)), answer):
        ids[place] = token
    return ids + [15], answer


def total(base):
    def make(r, length):
        ids = [r.randrange(base) for _ in range(length - 1)]
        return ids + [base], [sum(ids) % base]
    return make


OPERATORS = [max, min, lambda v: int(statistics.median(v)), lambda v: sum(v) % 10]


def tree(r, depth):
    """Ids of an expression, and its value: a digit in three of four cases, and at the depth's end."""
    if depth == 0 or r.random() < 0.75:
        digit = r.randrange(10)
        return [digit], digit
    operator = r.randrange(4)
    members = [tree(r, depth - 1) for _ in range(r.randint(2, 10))]
    ids = [10 + operator] + [i for member, _ in members for i in member] + [14]
    return ids, OPERATORS[operator]([value for _, value in members])


def listops(r, length):
    while True:
        ids, value = tree(r, 10)
        if length // 4 <= len(ids) < length:
            return ids + [15], [value]


TASKS = {"induction": induction, "copying": copying, "parity": total(2), "modulo3": total(3), "listops": listops}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--length", type=int, default=256, help="ids of a prompt")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    least = 18 if args.task == "copying" else 4
    if args.length < least:
        parser.error(f"--length: expected at least {least}, found {args.length}")
    r = random.Random(args.seed)
    for _ in range(args.count):
        prompt, answer = TASKS[args.task](r, args.length)
        print(json.dumps({"prompt": prompt, "answer": answer}, separators=(",", ":")))


if __name__ == "__main__":
    sys.exit(main())
