"""What tools/profile asks of the kernel's events and of perf's samples. Read from stdin what `perf script` prints."""

import json
import re
import sys
from collections import Counter, defaultdict
from html import escape

READ, WRITE, PREAD, PWRITE, WRITEV, FDATASYNC, FSYNC, PREADV2, PWRITEV2 = 0, 1, 17, 18, 20, 75, 74, 327, 328
FILE = {PREAD, PWRITE, FDATASYNC, FSYNC, PREADV2, PWRITEV2, 295, 296}
STEPS = ["whole", "to the queue", "wake-up", "daemon", "its file", "answer"]


class Request:
    """One system call of the program that puts the load on."""

    def __init__(self, number, start):
        self.number, self.start = number, start
        self.queued = self.taken = self.answered = self.worker = self.call = None
        self.file = 0.0

    def steps(self, end):
        whole = end - self.start
        if self.answered is None:
            return [whole] + [None] * 5
        return [
            whole,
            self.queued - self.start,
            self.taken - self.queued,
            self.answered - self.taken - self.file,
            self.file,
            end - self.answered,
        ]


def requests(lines):
    """All whole requests, by system call, as lists of steps in microseconds."""
    form = re.compile(r"\s*(.+?)\s+(\d+)\s+(\d+\.\d+):\s+([\w:]+):\s*(.*)")
    now, done = None, defaultdict(list)
    for line in lines:
        match = form.match(line)
        if not match:
            continue
        comm, tid, time, event, text = match.groups()
        time = float(time) * 1e6
        if event.endswith("sys_enter"):
            number = int(text.split()[1])
            if comm == "fio" and number in (PREAD, PWRITE, FDATASYNC):
                now = Request(number, time)
            elif now and comm == "fuse-worker" and tid == now.worker:
                if number in (WRITE, WRITEV) and now.answered is None:
                    now.answered = time
                elif number in FILE and now.answered is None:
                    now.call = time
        elif event.endswith("sys_exit"):
            number, value = int(text.split()[1]), int(text.split()[3])
            if now and comm == "fio" and number == now.number:
                if value >= 0 and (now.queued is None or now.answered is not None):
                    done[number].append(now.steps(time))
                now = None
            elif now and comm == "fuse-worker":
                if now.worker is None and number == READ and value > 0 and now.queued is not None:
                    now.worker, now.taken = tid, time
                elif tid == now.worker and number in FILE and now.call is not None:
                    now.file += time - now.call
                    now.call = None
        elif now and event.endswith("sched_waking"):
            if now.queued is None and comm.startswith("kworker") and "comm=fuse-worker" in text:
                now.queued = time
    return done


def steps(title):
    done = requests(sys.stdin)
    names = {PREAD: "", PWRITE: "", FDATASYNC: ""}
    if FDATASYNC in done:
        names = {PWRITE: "write, then", FDATASYNC: "  fdatasync"}
    for number, name in names.items():
        if number in done:
            line(f"{name or title}" + (f": {title}" if name else ""), done[number])


def line(title, rows):
    # Where the time is in many steps a mean adds up and a median does not; without those that something else held up.
    rows = sorted(rows, key=lambda row: row[0])[: len(rows) * 95 // 100]
    if not rows:
        sys.exit(f"{title}: no whole request was seen")
    # Those that found a worker awake woke none.
    through = [row for row in rows if row[1] is not None]
    if len(through) * 2 > len(rows):
        rows = through
    means = []
    for column in range(len(STEPS)):
        values = [row[column] for row in rows if row[column] is not None]
        means.append(sum(values) / len(values) if values else None)
    print(json.dumps([title, len(rows), *means]))


def table():
    """Of each title the median of the rounds, as printed by `line`."""
    rounds = defaultdict(list)
    for text in sys.stdin:
        title, *values = json.loads(text)
        rounds[title].append(values)
    print(f"{'mean of the quickest 95 of 100, us':38}" + "".join(f"{name:>13}" for name in STEPS) + f"{'whole, each round':>26}{'seen':>9}")
    for title, all_of in rounds.items():
        cells = []
        for column in zip(*all_of):
            known = sorted(value for value in column if value is not None)
            cells.append(known[len(known) // 2] if known else None)
        seen, steps = cells[0], cells[1:]
        text = "".join(f"{'' if cell is None else f'{cell:.1f}':>13}" for cell in steps)
        whole = " ".join(f"{values[1]:.0f}" for values in all_of)
        print(f"{title:38}{text}{whole:>26}{seen:>9}")


# Who does it, by the first that fits: a part of a thread's name, a function anywhere in the stack, what it is called.
KINDS = [
    ("", r"^(pv_native_safe_halt|default_idle|cpuidle_|poll_idle)", "idle"),
    ("fio", r"", "the program that asks (fio), and its system calls"),
    ("perf", r"", "other"),
    ("fuse-worker", r"^fuse_dev_(do_)?read|^fuse_dev_read", "daemon: takes a request from FUSE"),
    ("fuse-worker", r"^fuse_dev_(do_)?write|^fuse_dev_write", "daemon: answers it"),
    ("fuse-worker", r"fsync|fdatasync|sync_file_range|filemap_fdatawrite|writeback", "daemon: syncs, sends written data to the disk"),
    ("fuse-worker", r"pwrite|vfs_write|ext4_file_write|generic_perform_write|vfs_iter_write|do_iter_readv_writev_w", "daemon: writes the page cache of its file"),
    ("fuse-worker", r"pread|vfs_read|ext4_file_read|filemap_read", "daemon: reads the page cache of its files"),
    ("fuse-worker", r"crc32", "daemon: checksums"),
    ("fuse-worker", r"^futex|futex_|schedule|exit_to_user", "daemon: waits, hands over"),
    ("fuse-worker", r"", "daemon: map, slots, its own code"),
    ("kworker", r"loop|lo_|fuse_", "the kernel's thread of the loop device"),
    ("kworker", r"wb_|writeback|ext4", "the kernel's writeback"),
    ("ksoftirqd", r"", "interrupts put off (completions)"),
    ("", r"", "other"),
]


def kind(comm, stack):
    for part, function, name in KINDS:
        if part in comm and (not function or any(re.search(function, symbol) for symbol in stack)):
            return name
    return "other"


def samples(lines):
    """Each sample: who, and the stack from the outside in."""
    comm, stack = None, []
    for line in lines:
        if not line.strip():
            if comm is not None:
                yield comm, stack[::-1]
            comm, stack = None, []
        elif line[0].isspace() and comm is not None:
            words = line.split(None, 1)
            stack.append(re.sub(r"(::h[0-9a-f]{16}|\.llvm\.\d+)$", "", words[1].strip()) if len(words) > 1 else "?")
        else:
            comm = line.strip()
    if comm is not None:
        yield comm, stack[::-1]


def processors(title, rate, seconds, frequency, picture):
    rate, seconds, frequency = float(rate), float(seconds), float(frequency)
    kinds, stacks = Counter(), Counter()
    for comm, stack in samples(sys.stdin):
        name = kind(comm, stack)
        kinds[name] += 1
        if name != "idle":
            comm = re.sub(r"[:/][\w:]+", "", comm)
            stacks[(comm, *stack)] += 1
    print(f"\n{title}: {rate:,.0f} requests a second, processor time of each in us")
    for name, count in kinds.most_common():
        each = count / frequency / seconds / rate * 1e6
        if each >= 0.05:
            print(f"    {each:7.2f}  {name}")
    with open(picture, "w", encoding="utf-8") as out:
        out.write(flame(stacks, title))


def flame(stacks, title):
    """A flame graph (after Brendan Gregg): as wide as its share of all samples, callers below, in the order of the alphabet."""
    wide, row, least, most = 1200.0, 16, 0.002, 32
    total = sum(stacks.values())
    tree = {}
    for stack, count in stacks.items():
        level = tree
        # Deeper ones are those of programs without frame pointers, and say nothing.
        for frame in stack[:most]:
            entry = level.setdefault(frame, [0, {}])
            entry[0] += count
            level = entry[1]
    boxes, deepest = [], 0

    def place(level, left, depth):
        nonlocal deepest
        for frame, (count, below) in sorted(level.items()):
            if count >= total * least:
                deepest = max(deepest, depth)
                boxes.append((left, depth, count, frame))
                place(below, left, depth + 1)
            left += count

    place(tree, 0, 0)
    high = (deepest + 1) * row + 30
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:.0f} {high}" font-family="monospace" font-size="11">',
        f'<rect width="100%" height="100%" fill="#fff"/><text x="4" y="16">{escape(title)}: processor time, without sleep; callers below</text>',
    ]
    for left, depth, count, frame in boxes:
        x, width = left / total * wide, count / total * wide
        y = high - (depth + 1) * row - 2
        colour = "#f0923c" if "forkdisk" in frame else "#9fb3c8" if depth else "#d5d9e0"
        room = int((width - 4) / 6.7)
        text = frame if len(frame) <= room else frame[: room - 2] + ".." if room > 4 else ""
        label = f'<text x="{x + 2:.1f}" y="{y + 11}">{escape(text)}</text>' if text else ""
        out.append(
            f'<g><title>{escape(frame)} {100 * count / total:.1f} %</title>'
            f'<rect x="{x:.1f}" y="{y}" width="{max(width - 0.4, 0.2):.1f}" height="{row - 1}" fill="{colour}"/>{label}</g>'
        )
    return "\n".join([*out, "</svg>\n"])


def main():
    what, *rest = sys.argv[1:]
    if what == "table":
        table()
    elif what == "steps":
        steps(*rest)
    elif what == "processors":
        processors(*rest)


main()
