"""What the app shows, as HTML. Names of classes and files are other people's text: all of it goes through `safe`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from ..tables import percent, visible
from .session import Added, Answer, Guess, Outcome, Picture, Session

_MOST_NOTES = 12
_SIGNS = str.maketrans({sign: f"&#{ord(sign)};" for sign in "`${}@"})  # what Gradio's templates would act on

CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto !important; }
.step { border-top: 1px solid var(--border-color-primary); padding-top: 16px; margin-top: 8px; gap: 12px; }
.step .html-container { padding: 0 !important; }
.step h2 { margin: 0 0 4px; font-size: 1.25rem; display: flex; align-items: center; gap: 10px; }
.step h2 b { display: inline-grid; place-items: center; width: 1.75em; height: 1.75em; border-radius: 50%;
  font-size: 0.85rem; background: var(--primary-700); color: white; }
.step p, .lead { margin: 0; opacity: 0.75; }
.strip { display: flex; flex-wrap: wrap; gap: 8px; max-height: 330px; overflow-y: auto; }
.strip figure { margin: 0; width: 76px; font-size: 0.72rem; line-height: 1.25; text-align: center; }
.strip img, .shot { width: 76px; height: 76px; object-fit: contain; border-radius: 8px;
  background: #fff; border: 3px solid var(--border-color-primary); }
.strip .right img { border-color: #15803d; } .strip .wrong img { border-color: #c2410c; }
.strip figcaption { overflow-wrap: anywhere; } .judged { gap: 6px; }
.judged img { width: 112px; height: 112px; } .judged .what { min-height: 4.2em; font-size: 0.85rem; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 14px; }
.tile { border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 14px 16px; }
.tile.main { border: 2px solid var(--primary-700); }
.numbers + p { margin-top: 10px; }
.tile strong { display: block; font-size: 2.1rem; line-height: 1.2; }
.bar { height: 9px; border-radius: 5px; background: var(--border-color-primary); position: relative; margin: 6px 0; }
.bar i { position: absolute; inset: 0 auto 0 0; border-radius: 5px; background: var(--primary-600); }
.before .bar i { background: var(--neutral-400); }
.bar u { position: absolute; top: -4px; bottom: -4px; border: solid var(--body-text-color); border-width: 0 2px; }
table.plain { width: 100%; border-collapse: collapse; font-size: 0.9rem; margin-top: 12px; }
table.plain th, table.plain td { text-align: left; padding: 4px 10px 4px 0;
  border-bottom: 1px solid var(--border-color-primary); overflow-wrap: anywhere; }
.answer { display: flex; gap: 16px; border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 12px;
  margin-bottom: 10px; }
.answer > div { flex: 1; min-width: 0; }
.answer .row { display: grid; grid-template-columns: minmax(90px, 200px) 1fr 4em; gap: 10px; align-items: center; }
.tell { border-left: 4px solid var(--primary-600); padding: 2px 12px; margin: 4px 0; overflow-wrap: anywhere; }
.tell.bad { border-color: #c2410c; }
.folder { border: 1px dashed var(--border-color-primary); border-radius: 8px; padding: 14px; display: block;
  min-height: 150px; }
.folder input { display: block; margin-top: 10px; max-width: 100%; border: 0; }
:focus-visible { outline: 3px solid var(--primary-700); outline-offset: 2px; }
"""

# The browser tells where in the folder each file lies, which Gradio's own drop zone does not pass on.
FOLDER = """<label class="folder">A folder with one sub-folder for each class
<input type="file" webkitdirectory multiple><span role="status"></span></label>"""
FOLDER_SCRIPT = """
const input = element.querySelector('input'), told = element.querySelector('span');
input.addEventListener('change', async () => {
  const files = [...input.files], sent = [];
  try {
    for (const file of files) {
      told.textContent = ` ${sent.length} of ${files.length} files sent`;
      sent.push([(await upload(file)).path, file.webkitRelativePath || file.name]);
    }
    told.textContent = '';
    if (sent.length) trigger('submit', {files: sent});
  } catch (error) { told.textContent = ` Sending failed: ${error.message}`; }
});
"""


def safe(text: object) -> str:
    """Text that neither HTML nor a template nor a terminal obeys."""
    return html.escape(visible(str(text))).translate(_SIGNS)


def step(number: int, title: str, text: str) -> str:
    """Heading of a step."""
    return f"<h2><b aria-hidden='true'>{number}</b>{title}</h2><p>{text}</p>"


def told(lines: Iterable[str], bad: bool = False) -> str:
    """Notes, of which the first few are shown."""
    lines = list(lines)
    if not lines:
        return ""
    more = [f"... and {len(lines) - _MOST_NOTES} more"] if len(lines) > _MOST_NOTES else []
    items = "".join(f"<div>{safe(line)}</div>" for line in lines[:_MOST_NOTES] + more)
    return f"<div class='tell{' bad' if bad else ''}' role='status'>{items}</div>"


def added(result: Added) -> str:
    """What became of pictures that were handed over."""
    lines = [f"{_count(result.new, 'picture')} added."]
    if result.repeated:
        lines.append(f"{_count(result.repeated, 'picture')} left out: there already.")
    refused = [f"{_count(len(result.problems), 'picture')} not added:", *result.problems] if result.problems else []
    return told([*lines, *result.notes]) + told(refused, bad=True)


def strip(guesses: Sequence[Guess]) -> str:
    """Pictures of a class, each with what it is taken for without training."""
    return f"<div class='strip'>{''.join(map(_figure, guesses))}</div>"


def _figure(guess: Guess) -> str:
    mark, kind = ("✓", "right") if guess.is_right else ("✗", "wrong")
    text = f"{mark} {safe(guess.label)} {100 * guess.score:.0f} %"
    return f"<figure class='{kind}'>{_image(guess.picture)}<figcaption>{text}</figcaption></figure>"


def _image(picture: Picture) -> str:
    return f"<img src='{picture.preview}' alt='{safe(picture.name)}' title='{safe(picture.name)}'>"


def summary(session: Session, guesses: Sequence[Guess]) -> str:
    """How many pictures there are, and how many zero-shot gets right."""
    if not session.class_names:
        return told(["Name the classes first, or give a folder or a zip: its folders name them."])
    if not guesses:
        return told(["No pictures yet. Five to twenty of each class are a good start."])
    right = sum(guess.is_right for guess in guesses)
    share = right / len(guesses)
    text = f"{_count(len(guesses), 'picture')}. Without any training, {right} of them are taken for the right class"
    few = [name for name, count in session.counts().items() if count < 2]
    advice = f"<p>Fewer than two pictures: {safe(', '.join(few[:8]))}.</p>" if few else ""
    return f"<div class='before' role='status'>{text} ({percent(share)}).{_bar(share)}{advice}</div>"


def report(session: Session) -> str:
    """Accuracy with its interval, beside zero-shot, and by class."""
    outcome = session.outcome
    if outcome is None:
        text = "Begins with the classifier that was opened." if session.is_trained else "Not trained yet."
        return told([text])
    stale = ["Pictures or labels changed since: train again."] if session.is_stale else []
    return told(stale, bad=True) + (_accuracy(outcome) if outcome.metrics else "") + told(outcome.notes)


def _accuracy(outcome: Outcome) -> str:
    metrics = outcome.metrics
    low, high = metrics["accuracy_interval"]
    before = metrics["zero_shot_accuracy"]
    count = _count(metrics["num_images"], "picture")
    tiles = (
        f"<div class='tile main'>Trained<strong>{percent(metrics['accuracy'])}</strong>"
        f"{_bar(metrics['accuracy'], (low, high))}95 % interval: {percent(low)} to {percent(high)}</div>"
        f"<div class='tile before'>Without training (zero-shot)<strong>{percent(before)}</strong>"
        f"{_bar(before)}on the same pictures</div>"
    )
    how = (
        f"Measured by cross-validation on {count}: each was judged by a classifier trained without it "
        f"({metrics['folds']} rounds)."
    )
    rows = "".join(
        f"<tr><td>{safe(name)}</td><td>{row['support']}</td><td>{percent(row['accuracy'])}</td>"
        f"<td>{percent(row['zero_shot_accuracy'])}</td></tr>"
        for name, row in metrics["per_class"].items()
    )
    head = "<tr><th>class</th><th>pictures</th><th>trained</th><th>zero-shot</th></tr>"
    return (
        f"<div class='numbers'>{tiles}</div><p>{how}</p><details><summary>By class</summary>"
        f"<table class='plain'>{head}{rows}</table></details>"
    )


def judged(picture: Picture, guess: Guess | None) -> str:
    """One picture in the list in which labels are fixed."""
    text = f"Labelled <b>{safe(picture.label)}</b>"
    if guess is not None:
        text += f", taken for <b>{safe(guess.label)}</b> ({100 * guess.score:.0f} %)"
    return f"<div class='strip'>{_image(picture)}</div><div class='what'>{text}</div>"


def answers(rows: Sequence[Answer]) -> str:
    """What new pictures are taken for."""
    return "".join(map(_answer, rows))


def _answer(answer: Answer) -> str:
    if answer.error is not None:
        return told([answer.error], bad=True)
    rows = "".join(
        f"<div class='row'><span>{safe(name)}</span>{_bar(score)}<span>{percent(score)}</span></div>"
        for name, score in answer.classes
    )
    extra = []
    if answer.zero_shot is not None:
        extra.append(f"Without training: {safe(answer.zero_shot[0])} ({percent(answer.zero_shot[1])}).")
    if answer.known:
        extra.append("This picture is one of those above: what it is taken for says little about others.")
    best = answer.classes[0][0]
    return (
        f"<div class='answer'><img class='shot' src='{answer.preview}' alt='{safe(answer.name)}'>"
        f"<div><b>{safe(best)}</b>{rows}<p class='lead'>{' '.join(extra)}</p></div></div>"
    )


def _bar(share: float, interval: tuple[float, float] | None = None) -> str:
    mark = ""
    if interval is not None:
        low, high = interval
        mark = f"<u style='left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%'></u>"
    return f"<div class='bar' aria-hidden='true'><i style='width:{100 * share:.1f}%'></i>{mark}</div>"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
