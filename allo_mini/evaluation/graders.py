r"""The ten tasks: what the final answer of a response is, and whether it is the right one.

    ecqa, qasc, openbookqa      one of the options; graded by `official` too
    strategyqa                  yes or no; the same
    gsm8k, mawps, tabmwp        a number (tabmwp: or one of the options)
    math                        a number, expression, tuple, interval, list, ...
    alpaca_eval, arena_hard     no answer: their own tools judge what eval.py writes

A file's name tells its task. All are graded in the same steps, as are rows of any other file:

    concluded, final    where the answer stands: \boxed{}, "the answer is", "####", the last number
    bare, plain_math    without what wraps it, as words and as mathematics
    same                compared by the kind of the gold answer
"""

import re
from pathlib import Path
from unicodedata import normalize

# ---- where the answer stands -----------------------------------------------------------------

INSIDE = r"[^{}]*"
for _ in range(4):  # what may stand between braces: braces again, five deep
    INSIDE = r"(?:[^{}]|\{" + INSIDE + r"\})*"
SAID = (
    # "the answer to this is:", "answer =", "**Answer:**"
    r"(?i)\banswers?(?:\s+to\b[^.:\n]{0,80}?)?\s*(?:\b(?:is|are)\b(?: as follows:)?+|[:=])"
    # but no heading above lines of working
    r"(?![^\S\n]*+\n\s*+(?![$\\]|yes\b|no\b)(?=[^\n]*\d)(?=[^\n]*=|(?:\S+ +){6})[^\n]*\n\s*\S)"
    r"(?:[\s:,}]|\$\s*\n)*"
    # left out: "For $n = 3$, the sum is 42", "In 3 days, she has 42", "Thus, it is 42"
    r"(?:(?:(?:for|when|if|since|with|as)\b[^,.\n]*[$=]"
    r"|(?:in|after|for|over)\b[^,.\n]*\d)[^,.\n]*,\s*"
    r"|(?:thus|so|now|(?:al)?together),\s*)?"
    # the rest of the line, in which another answer may begin
    r"(?=([^\s:,}].*))")
# "so the answer is correct" checks the answer before it
NO_VALUE = (r"(?i)(?:(?:also|indeed|clearly|therefore|thus)\s+)*"
    r"(?:not|(?:in)?correct|right|wrong|confirmed|verified|valid|reasonable|consistent|plausible"
    r"|sensible|what|less|greater|smaller|larger)\b|[.;!?)](?!\d)")
DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
# in a text; no time of day, no 4,2
NUMBER = rf"(?<!\d)(?<!\d[:,])(?:(?<![\w)])[-−])?{DIGITS}(?:/\d+)?(?![:,]\d)"
LAYOUT = {
    r"\\(?:boxed|fbox)\s*([^\s{}$](?:[^\s{}$,]|\{" + INSIDE + r"\})*)": r"\\boxed{\1}",  # \boxed5
    r"(?<!\\)\\[()\[\]]|\$\$": "$",
    r"(?<![\w)])(?:\*\*|__|`)+|(?:\*\*|__|`)+(?![\w(])": "",  # bold and code, but not x**2
    r"(?<![\w*)}])([*_])([^\s*_][^*_\n]*)\1(?![\w*(])": r"\2"}  # italics, but not 2*3*4


def respelled(text, spelling):
    """A text after replacements: {pattern: replacement}, in their order."""
    for pattern, replacement in spelling.items():
        text = re.sub(pattern, replacement, text)
    return text


def concluded(text):
    r"""The last whole \boxed{}, else what follows the last "answer is", else GSM8K's "####"."""
    text = respelled(text, LAYOUT)
    boxes = re.findall(r"\\(?:boxed|fbox)\s*\{(?!\s*\})(" + INSIDE + r")\}", text)
    said = re.findall(SAID, text)
    values = [line for line in said if not re.match(NO_VALUE, line)]
    marked = re.findall(r"(?m)(?<!#)####\s*([-$]*\d[\d.,/]*)\s*$", text)
    return [None, *said, *marked, *values, *boxes][-1]  # the last one of the best kind


def final(text):
    """What a response concludes, else its last number."""
    return concluded(text) or [None, *re.findall(NUMBER, text)][-1]


# ---- the answer as words ---------------------------------------------------------------------

# words before an answer that are none of it
FILLER = (r"(?i)^\s*(?:(?:therefore|thus|hence|then|indeed|simply|just|clearly|now|exactly|about"
    r"|approx|approximately|roughly|around|option|choice|letter|equal to)\b[\s,:.]*|[≈~])+(?=\S)")
COMMAND = r"\\(?:text|mbox|mathrm|textbf|mathbf|textit|emph)\s*\{([^{}]*)\}"
WORDS = {**LAYOUT, COMMAND: r"\1", r"[\"'“”‘’$]|\\(?=[$%])": "", r"\s+": " ", FILLER: "",
    r"(?<=\d),(?=\d{3}\b)": "",  # 1,000 is 1000
    r"(?<=\d) ?(?:,|,? and) ?(?=[-\d])": ", ",  # "2,3" and "2 and 3" are "2, 3"
    r"^ |(?:(?<=\d)\.0+)?(?<=.)[.,;:!? ]*$": "",  # 5.0 is 5
    r"^(?:the|an?) (?!(?:because|since|as|is|and|or)\b)(?=\w)": "",
    r"^true\b": "yes", r"^false\b": "no"}
# what may follow an answer:
ENDS = (r"(?i:$"
    # a sentence: "42. So", "yes: he"
    r"|(?<![\\\s])[.?;]\s|[:!]\s+(?=[a-z])"
    # a rounding, a condition: "1/3 ≈ 0.33", "2 when $x = 1$"
    r"|\s*≈|\s+(?:for|when|if|at)\s+\$(?!\d)"
    # a reason: "yes because", "yes and he"
    r"|\s+(?:because|since|as|which|where)\b"
    r"|,?\s+and (?:we|he|she|it|they|this|that|i)\s"
    # the same behind a comma, a bracket or a dash: "yes, since", "42 (about"
    r"|\s*(?:,|\s\(|\s[-–—])\s*(?:because|since|as|so|for|which|where|who|when|if|the|not|it|this"
    r"|that|we|they|there|but|thus|hence|therefore|i think|(?:or )?(?:about|approx\w*))\b"
    # a remark or a calculation: "42 (as", "42 (= 6", "42 (6 * 7)", "42 - the"
    r"|\s+\((?=[a-z]{2}|=|\$?\d[\d.]*(?: [a-z]+)?\s*[-+*/×=x])"
    r"|\s+[-–—]+\s+(?=[a-z]{3}))")
OPTION_ENDS = rf"(?:[,;]| (?:it|he|she|you|we|they|this|that|there) |{ENDS})"
# what may follow a letter: "B)", "B", "B. Paris", "B, the", "B - Paris", but not "B, C" or "a dog"
LETTER_ENDS = (r"(?:[)\]}](?!,? (?:and|or)\b|, ?[(\[])|$|[.:;!?](?= |$)|,(?= (?!and|or)[a-z]{2})"
    r"|(?= [-–(]| (?:because|since|as|is)\b))")
OPTIONS = "\nOptions:\n"  # stands between a question and its options, one a line


def bare(answer):
    """Words without what does not matter: case, quotes, dollars, final punctuation, article."""
    return respelled(answer.lower(), WORDS)


def begins(answer, words, ends):
    """Whether an answer is these words, alone or labelled with a letter, up to where it ends."""
    label, word, rest = answer.partition(words or "\n")
    return word and re.fullmatch(r"(?:[(\[]?[a-j][)\].:]+ )?", label) and re.match(ends, rest)


# ---- the answer as mathematics ---------------------------------------------------------------

FORMULAS = {
    # quotes, bold and punctuation around it
    r"^[\"'`*_“”‘’\s]+|(?<!\\)[\"'`*_“”‘’.,;:?\s]+$": "",
    FILLER: "", r"[−–]": "-",
    r"(?<![\d.])(\d+) million\b": r"\g<1>000000",
    r"\\\\": ";",  # between the rows of a matrix
    r"(?<=\d)\s*(?:[*×·]|\\cdot|\\times)\s*(?=[a-z\\(√π])": "",  # 2*x is 2x
    # LaTeX's spaces and brackets, units of one sign, a comma of 1{,}000
    r"\\!\s*|\\[,;:(){}\[\]$%]|[$%°]|\{,\}(?=\d)"
    r"|\\(?:left|right|displaystyle|degree|cup)\b|∪|\^\s*\{?\s*\\circ\s*\}?"
    # +\infty, \dbinom, {bmatrix} and \sin without what does not matter
    r"|(?<!\w)\+(?=\\infty)|(?<=\\)[dt](?=binom)|(?<=\{)[bp](?=matrix\})"
    r"|\\(?=(?:sin|cos|tan|cot|sec|csc|log|ln)\b)"
    # commas of 1,000 but not of (1,000)
    r"|(?<=\d),(?:\\!\s*)?(?=\d{3}\b)(?![^()\[\]]{0,99}[)\]])": "",
    r"\\ |~": " ",
    # a unit at the end; other \text{} is kept without its command
    r"(?<=\S)\s*\\(?:text|mbox|mathrm)\s*\{(?! *(?:and|or)\b)[^{}]*\}(?:\^\{?\d\}?)?\s*$": "",
    COMMAND: r"\1",
    # sqrt(2), √2, \sqrt2
    r"(?:(?<![A-Za-z\\])\\?sqrt|√)\s*\(([^()]*)\)|√\s*(\d+|[a-z])|\\sqrt\s*(\w)": r"\\sqrt{\1\2\3}",
    r"π|(?<![\\A-Za-z])pi\b": r"\\pi ",
    # 1\frac{2}{3} is 1 (2)/(3)
    r"(\d?)\s*\\[dtc]?frac" + 2 * (r"\s*(?:\{(" + INSIDE + r")\}|(\\pi|[^{}\s\\]))"):
        r"\1 (\2\3)/(\4\5)",
    r"\b(?:minus|negative) +(?=[\d.\\(])|^- +": "-",
    # brackets around all of it, or around one term above or below a stroke
    r"^[(\[]([^()\[\],;]+)[)\]]$|^\{([^{}]*)\}$"
    r"|\(\s*(-?[^()+-]*?)\s*\)(?=/)|(?<=/)\(\s*([\w.]+|\\\w+(?:\{\w*\})?)\s*\)": r"\1\2\3\4",
    r"([_^])\s*\{(-?\w+)\}": r"\1\2",  # x^{2} is x^2
    r"<=|≤|\\leq\b": r"\\le ", r">=|≥|\\geq\b": r"\\ge ",
    r"∞": r"\\infty ", r"±": r"\\pm ", r"\\(?:cdot|times)\b|[×·]": "*", r",?\s+(?:and|or)\s+": ",",
    r"(?:(?<=\})|(?<=\\pi))\s+[A-Za-z]{2}[A-Za-z ]*(?:\^\d)?$": "",  # a unit behind 2\sqrt{3}
    # names: all of x = 2, x = -3 (first each but the last, then that), none of x = 2, y = -3
    r"([a-z]{1,2})\s*=\s*(?=[^=]*[,;]\s*\1\s*=)": "",
    r"^([^=]*[,;]|)\s*[a-z]{1,2}(?:_\d)?(?:\([a-z]\))?\s*(?:=|\\in\b)\s*(?=[^=]*$)": r"\1"}
# -2, 1 1/2, 3/4
VALUE = (rf"(-?) ?(?:(\d+) (?=\d+ ?/))?({DIGITS})(?: ?[/⁄] ?(0*[1-9]\d*))?"
    # 5 apples, 3 m^2, but not 3 pi, 5 million
    r"(?: (?!(?:pi|sqrt|or|and|to|out|divided|[a-z]+illion|thousand)\b)(?:m|[a-z]{2}[a-z .]*)"
    r"(?:\^\d)?)?")
PROSE = r"(?i)^(?!\$\d)[a-z$].*\b(?:is|are|equals)\b(?!\s+the\b)\s*"  # the largest $n$ is
FORMULA = r"^[^$]*\$([^$]*[^$\s])\$(?!\d|\s*(?:,|and\b|or\b))"
# a gold answer with one of these is no mere words
FORMAL = r"[\\^=√π]|\w ?[-+*/] ?\w|^[-−]?\$?[\d.]+(?:,\d{3})*(?:\.\d+)? ?%?$"
# the number that words begin with, else their last, but not
LONE = (
    # in a calculation or a list: 2x, (1, 2), 3 - 4, "3 cats and 4 dogs"
    r"^(?!.*(?:[\\^_*+<=>|(){}\[\]]|\d ?-|\d \d|\d [iknxyz]\b|,\s*-?\d|\d [a-z]+ (?:and )?\d"
    # beside words that change it: "not 3", "3 million", "3 out of 4", "half of 6"
    r"|\b(?:not|ln|log|sin|cos|tan|sqrt|[a-z]+illion|thousand)\b|\d,? (?:to|out of|divided)\b"
    r"|\b(?:half|twice|adding|subtracting)(?: of)? \W?\d"
    # with a letter behind it that is no unit's
    r"|\d(?!(?:cm|mm|km|kg|mg|ml|ft|lbs?|mph|[ap]m)\b)[a-z]))"
    rf"(?:(?![-\d.]).*(?<![-/.]))?({NUMBER})")


def plain_math(text):
    """A mathematical answer in one spelling, lower case."""
    text = re.sub(r"([⁻⁰¹²³⁴-⁹]+)", r"^{\1}", text.lower())
    return respelled(normalize("NFKC", text), FORMULAS).strip()


def value(piece):
    """The number that a piece of `plain_math` is, else the piece without spaces."""
    match = re.fullmatch(VALUE, piece)
    if not match:
        return piece.replace(" ", "")
    sign, whole, above, below = match.groups()
    number = float(whole or 0) + float(above) / float(below or 1)
    return -number if sign else number


def pieces(text):
    """A mathematical answer cut at brackets and commas.

    A list without brackets is sorted, for its order says nothing.
    """
    cut = [value(piece) for piece in re.split(r"\s*([()\[\],;&])\s*", plain_math(text)) if piece]
    return cut if "(" in cut or "[" in cut else sorted(set(cut), key=str)


def same_math(first, second):
    """Piece by piece spelt the same, or the same number: whole ones exactly, others to 1e-4."""
    ours, theirs = pieces(first), pieces(second)
    return len(ours) == len(theirs) and all(a == b or type(a) is type(b) is float and
        abs(a - b) <= min(0.5, 1e-4 * abs(a)) for a, b in zip(ours, theirs))


def says(given, gold):
    """Whether a formula, or the sentence around it, says the same as a mathematical gold answer."""
    text = re.sub(PROSE, "", re.split(ENDS, given, maxsplit=1)[0])
    # what one calculation leads to, alone or in a sentence; in a list every "=" has its own
    result = re.sub(r"^(?:[^,;]*|[a-z]+,? [a-z]+,? .*)=(?=[^,;]*$)", "", plain_math(text))
    readings = {given, text, result, *re.findall(FORMULA, text), *re.findall(LONE, result)}
    return any(same_math(reading, gold) for reading in readings)


# ---- comparing: same(given, gold, question) says whether two final answers are the same ----------

def same(given, gold, question):
    """By the kind of the gold answer: an option, its letter, yes or no, words, mathematics."""
    wanted, answer = bare(gold), bare(given)
    options = list(map(bare, question.partition(OPTIONS)[2].splitlines())) or ["yes", "no"]
    if wanted in options:
        named = [option for option in options if begins(answer, option, OPTION_ENDS)]
        return wanted == max(named, key=len, default="")
    letter = re.fullmatch(r"\W?([a-z])\W?", wanted)
    if letter:
        return re.match(r"[(\[{]?" + letter[1] + LETTER_ENDS, answer)
    return begins(answer, wanted, ENDS) or re.search(FORMAL, gold) and says(given, gold)


def same_result(given, gold, question):
    """`same`, for tasks in which units and the order of a list say nothing."""
    return same(given, gold, question) or OPTIONS not in question and says(given, gold)


def official_correct(text, task):
    """`is_correct` by RLMEC's grader of QA tasks (github.com/Timothy023/RLMEC), which ALLO uses.

    It lowercases the prediction but not the gold answer, so that a gold answer with a capital
    (18 % of QASC) can never be given.
    """
    _, mark, said = text.rpartition("The answer is")
    return mark != "" and said.strip().lower() == gold_answer(task)


QA = ("ecqa", "qasc", "openbookqa", "strategyqa")  # those that have an `official` grader too
RULES = dict.fromkeys(QA, (concluded, same))  # task -> how to find an answer, how to compare two
RULES |= dict.fromkeys(("math", "gsm8k", "mawps", "tabmwp"), (final, same_result))
JUDGED = {"alpaca_eval": "instruction", "arena_hard": "prompt"}  # no grader; their rows' question


def spelled(name):
    """A name as names are compared."""
    return name.lower().replace("-", "_")


def task_name(file):
    """Which of the ten tasks a file (or a task's own name) names; "" for none or several."""
    name = spelled(Path(file).name)
    named = [t for t in (*RULES, *JUDGED) if re.search(rf"(?<![a-z]){spelled(t)}(?![a-z])", name)]
    for longest in named:
        if all(spelled(task) in spelled(longest) for task in named):  # "math" is in "math_sort"
            return longest
    return ""


def gold_answer(task):
    """The `answer` field of a Task, else what its reference solution concludes, or None.

    Of "4. I hope it is correct." the 4; an `answer` may be a solution, too.
    """
    extract, _ = rule_of(task, concluded)  # a mere number in a text of no known task is no answer
    said = extract(task.output or "") if task.answer is None else concluded(task.answer)
    return re.sub(r"(?<=[\d$}])\.\s.*", "", said) if said else task.answer


def rule_of(task, otherwise=final):
    """A Task's entry in RULES; where no file's name tells it, answers are found by `otherwise`."""
    return RULES.get(task_name(task.source), (otherwise, same))


def is_correct(text, task):
    """Whether a response's final answer is the task's, by the `fixed` grader of its file."""
    extract, compare = rule_of(task)
    given, gold = extract(text), gold_answer(task)
    return None not in (given, gold) and bool(compare(given, gold, task.question))
