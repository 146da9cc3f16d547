def exercise(first_row, rows, n, prefix, tile):
    end = min(max(prefix, first_row + rows), n)  # the last row sees the keys before it
    full_end = min(max(prefix, first_row + 1), n) // tile * tile  # and the first row these
    return [*range(full_end, end, tile)], [*range(0, full_end, tile)]
