import math


def exercise(scores):
    row_max, row_sum = -math.inf, 0.0
    for s in scores:
        if s == -math.inf:
            continue
        new_max = max(row_max, s)
        row_sum = row_sum * math.exp(row_max - new_max) + math.exp(s - new_max)
        row_max = new_max
    return row_max + math.log(row_sum) if row_sum else -math.inf
