"""What becomes of figures: markdown tables with medians and spreads, plots as SVG, and the pages of docs/."""

import math
import statistics
from html import escape
from pathlib import Path

PAGE = Path("docs/performance.md")
PLOTS = Path("docs/performance")
COLOURS = {"raftkv": "#c2410c", "etcd": "#1d4ed8", "etcd-json": "#7aa2f7", "echo": "#6b7280"}


def number(value):
    """Three digits, and all of a large number."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def spread(values):
    """Median, and from the least to the most where there are several."""
    middle = number(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({number(min(values))}–{number(max(values))})"


def ratios(ours, theirs):
    """Pair by pair, so that what the machine did meanwhile touches both."""
    return [mine / other for mine, other in zip(ours, theirs) if other]


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|:--|" + "--:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def compare(metrics, results, floor=None):
    """A table of metrics by system. `metrics` is (title, key, unit); `results` is {system: {key: [a value a pair]}}.
    The ratios are raftkv's to each other system's, and to its floor's."""
    others = [system for system in results if system != "raftkv"]
    head = ["", *results, *(f"raftkv ÷ {other}" + (" (floor)" if other == floor else "") for other in others)]
    rows = []
    for title, key, unit in metrics:
        row = [f"{title}, {unit}" if unit else title]
        row += [spread(values[key]) if values.get(key) else "" for values in results.values()]
        for other in others:
            found = ratios(results["raftkv"].get(key, []), results[other].get(key, []))
            row.append(spread(found) if found else "")
        rows.append(row)
    return table(head, rows)


def write_page(part, text):
    """Puts `text` between the part's two markers in the page; what is around them stays."""
    begin, end = f"<!-- bench:{part} -->", f"<!-- /bench:{part} -->"
    page = PAGE.read_text()
    if begin not in page or end not in page:
        page = f"{page.rstrip()}\n\n## {part.capitalize()}\n\n{begin}\n{end}\n"
    before, rest = page.split(begin, 1)
    PAGE.write_text(before + begin + "\n" + text.strip() + "\n" + end + rest.split(end, 1)[1])


def bars(path, title, groups):
    """Bars in groups, {group: {system: [values]}}: the median, and a line from the least to the most."""
    width, height, left, margin, top, bottom = 640, 300, 70, 36, 40, 40
    high = max((max(values) for systems in groups.values() for values in systems.values()), default=1) or 1
    step = 10 ** math.floor(math.log10(high))
    high = next(step * factor for factor in (1, 2, 3, 5, 10) if step * factor >= high)
    y = lambda value: top + (height - top - bottom) * (1 - value / high)
    out = [frame(width, height, title)]
    for quarter in range(5):
        value = high * quarter / 4
        out.append(f'<path d="M{left} {y(value):.1f}H{width - margin}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{number(value)}</text>')
    group_width = (width - left - margin) / len(groups)
    for place, (group, systems) in enumerate(groups.items()):
        start = left + place * group_width
        bar = group_width * 0.8 / len(systems)
        for index, (system, values) in enumerate(systems.items()):
            x, middle = start + group_width * 0.1 + index * bar, statistics.median(values)
            colour = COLOURS[system]
            size = f'width="{bar * 0.9:.1f}" height="{y(0) - y(middle):.1f}" fill="{colour}"'
            out.append(f'<rect x="{x:.1f}" y="{y(middle):.1f}" {size}><title>{system} {spread(values)}</title></rect>')
            line = f"M{x + bar * 0.45:.1f} {y(min(values)):.1f}V{y(max(values)):.1f}"
            out.append(f'<path d="{line}" stroke="#000"/>')
        out.append(label(start + group_width / 2, height - 16, group))
    out.append(legend(list(next(iter(groups.values()))), width))
    save(path, out)


def curves(path, title, systems):
    """Latency by percentile, {system: [(percentile, microseconds)]}, each nine as wide as the other."""
    width, height, left, margin, top, bottom = 640, 300, 70, 36, 40, 40
    nines = lambda percentile: -math.log10(1 - percentile / 100)
    points = [point for curve in systems.values() for point in curve]
    right = math.ceil(max((nines(point[0]) for point in points), default=2))
    low = math.floor(math.log10(max(0.1, min(point[1] for point in points))))
    high = max(low + 1, math.ceil(math.log10(max(point[1] for point in points))))
    x = lambda percentile: left + nines(percentile) / right * (width - left - margin)
    y = lambda micros: top + (height - top - bottom) * (1 - (math.log10(max(0.1, micros)) - low) / (high - low))
    out = [frame(width, height, title)]
    for exponent in range(low, high + 1):
        at = y(10.0**exponent)
        out.append(f'<path d="M{left} {at:.1f}H{width - margin}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{number(10.0**exponent / 1000)} ms</text>')
    for nine in range(right + 1):
        percentile = 100 - 10.0 ** (2 - nine)
        out.append(label(x(percentile), height - 16, f"{percentile:.{max(0, nine - 2)}f} %"))
    for system, curve in systems.items():
        line = " ".join(f"{x(percentile):.1f},{y(micros):.1f}" for percentile, micros in curve)
        out.append(f'<polyline fill="none" stroke="{COLOURS[system]}" stroke-width="1.5" points="{line}"/>')
    out.append(legend(list(systems), width))
    save(path, out)


def frame(width, height, title):
    box = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12"'
    white = f'<rect width="{width}" height="{height}" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>\n{white}\n<text x="10" y="18">{escape(title)}</text>'


def label(x, y, text):
    return f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{escape(text)}</text>'


def legend(systems, width):
    out = []
    for place, system in enumerate(systems):
        x = width - 100 * (len(systems) - place)
        out.append(f'<rect x="{x}" y="24" width="10" height="10" fill="{COLOURS[system]}"/>')
        out.append(f'<text x="{x + 14}" y="33">{system}</text>')
    return "\n".join(out)


def save(path, lines):
    PLOTS.mkdir(parents=True, exist_ok=True)
    (PLOTS / path).write_text("\n".join(lines) + "\n</svg>\n")
