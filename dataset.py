"""Data: storyboards, the pocket world, encoders, people's own videos, and the latents that training reads.

    python dataset.py --render 8 --out videos         # episodes of the pocket world: NAME.mp4 with NAME.json
    python dataset.py --ingest videos --out data      # those, or your own videos, to latents and texts
    python dataset.py --ingest videos --out data --vae COGVIDEOX --text_encoder COGVIDEOX    # by CogVideoX's
    python dataset.py --storyboard 7 --segments 3     # a storyboard that training never sees, to edit


Ingestion reads `NAME.mp4` (or what else ffmpeg reads) and beside it `NAME.json`, a list of scenes

    [{"start": 0.0, "end": 9.5, "place": "kitchen", "segments": ["Mia runs ...", "Pip waves ...", ...]}, ...]


with times in seconds and one paragraph for every whole 3 seconds. The place is any word, or left out;
training on several segments takes stories in which one returns. Written is a file for each video

    NAME.safetensors    latents float16 [S, 13, C, h, w]: segment i has those of frames 48 i ... 48 i + 48
                        text float16 [S, N, dim]: the embeddings of its paragraphs
                        metadata: source (made from what), made_with (what the index says of all files),
                        scenes (lists of paragraphs), places (one a segment)
    index.json          format, codec, scale, text_encoder, fps, latents [13, C, h, w], text [N, dim] and
                        videos [{"file", "segments", "places"}]


Sections of the paper are those of arXiv 2504.05298v1.
"""

import argparse
import hashlib
import json
import logging
import os
import re
import sys
import textwrap
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby, islice
from pathlib import Path

import imageio
import imageio_ffmpeg
import numpy as np
import torch
from einops import rearrange, reduce, repeat
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

FPS = 16                    # frames a second (3.1)
SECONDS = 3                 # of a segment
SEGMENT = FPS * SECONDS     # 48 frames
FOURS = 4                   # frames in a latent frame; the first frame of a video has one alone
FRAMES = SEGMENT // FOURS   # 12 latent frames in a segment


# 1. Errors and files --------------------------------------------------------------------------------------

class UserError(ValueError):
    """The user's mistake in one sentence: what is wrong, where, what to do. Exit status 2."""


def check(condition, sentence):
    if not condition:
        raise UserError(sentence)


def warn(sentence):                 # above progress bars
    tqdm.write(f"warning: {sentence}", file=sys.stderr)


@contextmanager
def reading(what):
    """Around everything that reads what a user named: any error inside becomes a UserError that names it."""
    try:
        yield
    except Exception as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).strip() or type(error).__name__
        raise UserError(f"{what}: cannot be read ({reason.splitlines()[0]})") from error


def run_main(main):
    """Calls main() and exits: 0 done, 2 the user's mistake, 130 interrupted, 1 (and a traceback) our bug."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                                         # ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError, json.JSONDecodeError, SafetensorError) as error:
        tqdm.write(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def whole_number(low, high=2 ** 31 - 1, step=1):
    """argparse's type of whole numbers low, low + step ... high."""
    def number(text):
        if int(text) not in range(low, high + 1, step):
            raise argparse.ArgumentTypeError(f"{text} is not one of {low}, {low + step} ... {high}")
        return int(text)
    return number


positive, seed_number = whole_number(1), whole_number(0)


def finite(text):                   # argparse's type of numbers
    if not np.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text}: must be a finite number")
    return float(text)


def short_hash(data):
    return hashlib.sha256(data).hexdigest()[:12]


@contextmanager
def atomic(path):
    """Yields a temporary path beside `path` that takes its place if all goes well: whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{short_hash(os.fsencode(path.name))}{path.suffix}")
    try:
        partial.touch()
        mode = partial.stat().st_mode                     # the umask's; safetensors makes it 0600
        yield partial
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def hold(folder):
    """A lock beside a stage's folder, lest two runs write into it. UserError if another run holds it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_suffix(".lock").open("w")
    try:
        import fcntl                                          # not on Windows
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        raise UserError(f"{folder}: another run is at work here") from None
    return lock


# 2. Storyboards (3.2) ---------------------------------------------------------------------------------------

START, END = "<start_scene>", "<end_scene>"


@dataclass(frozen=True)
class Segment:
    """What happens in three seconds: the text with its scene marks, what to avoid, and its scene's number."""
    text: str
    negative: str | None
    scene: int


def read_text(path):
    """A file in UTF-8, or UTF-16 with its mark, without what a reader cannot see, in one form of Unicode."""
    with reading(path):
        data = Path(path).read_bytes()
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    text = unicodedata.normalize("NFC", text)
    return "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def one_line(text):
    return " ".join(text.split())


def mark_scene(paragraphs):
    """The paragraphs of one scene as the text encoder reads them: marks around the first and the last."""
    last = len(paragraphs) - 1
    return [START * (i == 0) + text + END * (i == last) for i, text in enumerate(paragraphs)]


def to_segments(scenes, negatives=None):
    """Scenes, lists of paragraphs, and one negative or None a paragraph -> a list of Segments."""
    texts = sum([mark_scene(scene) for scene in scenes], [])
    numbers = np.repeat(range(len(scenes)), [len(scene) for scene in scenes]).tolist()
    return [Segment(*facts) for facts in zip(texts, negatives or [None] * len(texts), numbers)]


def parse_video(video, name):
    """A video of the official format, segments {text, requires_scene_transition, neg_text}, or texts."""
    check(isinstance(video, list) and video, f"{name}: a video is a list of segments, not {str(video)[:40]}")
    scenes, negatives, ended = [], [], True
    for number, segment in enumerate(video, 1):
        with reading(f"{name} {number}, {str(segment)[:50]!r}"):
            segment = {"text": segment} if isinstance(segment, str) else segment
            text, negative = one_line(segment["text"]), one_line(segment.get("neg_text") or "")
            bare = text.removeprefix(START).removesuffix(END).strip()
            assert bare and not re.search(r"<\w*>", bare), f"empty, or marks but {START} and {END}"
        if ended or segment.get("requires_scene_transition") or text.startswith(START):
            scenes.append([])
        ended = text.endswith(END)
        scenes[-1].append(bare)
        negatives.append(negative or None)
    # DIFF: the official sampler leaves out the video's first start mark and last end mark; Format 3 has them.
    return to_segments(scenes, negatives)


def parse_storyboard(path):
    """Videos, each a list of Segments, from the official JSON or JSONL, or a .txt with one video in Format 3:
    paragraphs parted by blank lines, <start_scene> and <end_scene> around every scene."""
    name, suffix, text = Path(path).name, Path(path).suffix.lower(), read_text(path)
    check(suffix in (".txt", ".json", ".jsonl"), f"{name}: a storyboard is .txt (Format 3), .json or .jsonl")
    with reading(name):
        if suffix == ".txt":
            text = "\n".join(text.replace("\u2029", "\n\n").splitlines())
            text = re.sub(rf"\s*{START}\s*", f"\n\n{START}", re.sub(rf"\s*{END}\s*", f"{END}\n\n", text))
            videos = [[paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]]
        else:
            lines = re.findall(r".*\S.*", text)
            videos = json.loads(text) if suffix == ".json" else json.loads(f"[{','.join(lines)}]")
        assert isinstance(videos, list) and videos, "it must be a list of videos, [[{...}, {...}]]"
    return [parse_video(video, f"{name}, video {i}, segment") for i, video in enumerate(videos, 1)]


def embed(board, text_encoder, where="storyboard"):
    """Segments -> text and negative, float32 [S, N, dim] each; zeros where a segment has no negative."""
    text = text_encoder.encode([segment.text for segment in board], where)
    negative = text_encoder.encode([segment.negative or "" for segment in board], f"{where}, neg_text")
    given = torch.tensor([bool(segment.negative) for segment in board])
    return text, negative * given[:, None, None]


# 3. The pocket world ----------------------------------------------------------------------------------------
# Text tells the room, who is there and what they do. Everything named in a palette below is drawn once an
# episode and never told: what comes back looks as it did only to a model that remembers.

ROOMS = {"kitchen": "with its window and counter", "bedroom": "with its bed and the moon outside",
         "library": "with its tall bookshelf", "garden": "with its tree and white fence"}
CHARACTERS = {"Mia": "cat", "Pip": "mouse"}
CHARACTER_COLOURS = {"red": (220, 50, 50), "yellow": (250, 205, 40), "green": (50, 165, 70),
                     "cyan": (50, 195, 210), "blue": (55, 85, 220), "magenta": (205, 65, 195)}
WALL_COLOURS = {"rose": (244, 172, 172), "sand": (247, 224, 150), "mint": (172, 226, 178),
                "sky": (164, 208, 246), "lilac": (204, 180, 240), "pearl": (234, 234, 230)}
FURNITURE_COLOURS = {"navy": (44, 58, 120), "crimson": (150, 34, 50), "forest": (30, 96, 62),
                     "ochre": (206, 146, 40), "ivory": (242, 238, 228), "violet": (112, 60, 142)}
FURNITURE = ("armchair", "table", "chest", "lamp")
HEIGHT, WIDTH = 128, 192                  # of the drawings; the codec reads them at half the size
PLACES = {"left": 0.375, "middle": 0.75, "right": 1.125}                         # in picture heights, 1 x 1.5
SPEED = {"walk": 0.375, "run": 0.75}      # picture heights a segment
FEET = {"Mia": 0.88, "Pip": 0.95}
TEST_SEEDS = 1_000_000                    # episodes below are trained on, from here on held out
VERBS = {"stand": ("stands still", "waits quietly", "rests"), "wave": ("waves a paw", "waves hello"),
         "jump": ("jumps up and down", "hops happily"), "walk": ("walks", "strolls", "wanders"),
         "run": ("runs", "dashes", "races")}
OFTEN = ("stand", "wave", "wave", "jump", "jump", "walk", "walk", "walk", "run", "run")
AT = {"left": ("on the left", "at the left side"), "middle": ("in the middle", "in the centre"),
      "right": ("on the right", "at the right side")}
FILLERS = ("Nobody else is here.", "The camera does not move.",
           "Everything else is quiet.", "It is a calm day.")


@dataclass(frozen=True)
class Scene:
    """Segments first ... first + segments - 1 with a text each. `drawings`, four frames each: 12 segments + 1
    times {who: (x, y, pose, facing right)}, feet in picture heights; the last one parts scenes in latents."""
    room: str
    cast: tuple
    first: int
    segments: int
    texts: tuple
    drawings: tuple


@dataclass(frozen=True)
class Episode:
    """A storyboard and the truth behind it, which it hides, names into the palettes: colours {character:
    name} and rooms {room: (wall, kind of furniture, its colour)}."""
    seed: int
    scenes: tuple
    segments: tuple
    colours: dict
    rooms: dict


def pick(rng, options):
    options = list(options)
    return options[rng.integers(len(options))]


def plan_rooms(rng, segments):
    """[(room, segments)] of scenes of 1 to 3 segments: mostly A B A, and once at least if it can be."""
    rooms, lengths = [], []
    while sum(lengths) < segments:
        comes_back = len(rooms) == 2 or len(rooms) > 2 and rng.random() < 0.7
        room = rooms[-2] if comes_back else pick(rng, [room for room in ROOMS if room not in rooms[-2:]])
        needed = max(2 - len(rooms), 0) if segments >= 3 else 0             # segments kept for the return
        length = rng.choice([1, 2, 3], p=[0.76, 0.16, 0.08])
        lengths.append(int(min(length, segments - sum(lengths) - needed)))
        rooms.append(room)
    return zip(rooms, lengths)


def plan_actions(rng, places):
    """{who: (verb, start, end)} for characters at {who: place}; in the end everyone has a place alone."""
    plan = {}
    while len({end for _, _, end in plan.values()}) < len(places):
        for who, start in places.items():
            verb = pick(rng, OFTEN)
            reach = {"walk": 0.5, "run": 1.0}.get(verb, 0.0)
            ends = [end for end in PLACES if 0 < abs(PLACES[end] - PLACES[start]) < reach]
            plan[who] = verb, start, pick(rng, ends or [start])
    return plan


def pose_at(t, y, verb, start, end):
    """An action in drawing t of 0 ... 12, for feet that stand at y: (x, y, pose, facing right)."""
    a, b = PLACES[start], PLACES[end]
    if a != b:
        steps = round(FRAMES * abs(b - a) / SPEED[verb])
        return a + (b - a) * min(t / steps, 1), y, f"walk{t % 4}" if t < steps else "stand", b > a
    if verb == "jump":
        lift = 0.14 * abs(np.sin(2 * np.pi * t / FRAMES))
        return b, y - lift, "air" if lift > 0.01 else "stand", end == "left"
    return b, y, f"wave{t % 4}" if verb == "wave" else "stand", end == "left"


def write_paragraph(rng, room, plan):
    """What {who: (verb, start, end)} do, in 15 to 34 words without scene marks."""
    clauses = []
    for who, (verb, start, end) in sorted(plan.items(), key=lambda _: rng.random()):
        words = f"{pick(rng, (who, f'{who} the {CHARACTERS[who]}'))} {pick(rng, VERBS[verb])}"
        clauses.append(f"{words} {f'from the {start} to the {end}' if start != end else pick(rng, AT[end])}")
    deed = pick(rng, (" while ", " and ", "; meanwhile ")).join(clauses)
    long = f"{room} {ROOMS[room]}"
    where = pick(rng, (room, long, long))
    where = long if len(clauses) == 1 or len(deed.split()) < 14 else where
    forms = f"In the {where}, {deed}.", f"Here is the {where}: {deed}.", f"We see the {where}, and {deed}."
    text = pick(rng, forms)
    text = text if len(text.split()) <= 34 else f"In the {room}, {deed}."
    while len(text.split()) < 15:
        text += " " + pick(rng, [filler for filler in FILLERS if filler not in text])
    return text


def episode(seed, segments):
    """The episode of a seed, `segments` segments of 3 seconds, the same on every machine."""
    rng = np.random.default_rng([2504, seed])
    colours = dict(zip(CHARACTERS, rng.permutation(list(CHARACTER_COLOURS)).tolist()))
    hidden = WALL_COLOURS, FURNITURE, FURNITURE_COLOURS
    rooms = {room: tuple(pick(rng, names) for names in hidden) for room in ROOMS}
    scenes, first = [], 0
    for room, length in plan_rooms(rng, segments):
        cast = pick(rng, (("Mia",), ("Pip",), ("Mia", "Pip"), ("Mia", "Pip")))
        places = dict(zip(cast, rng.permutation(list(PLACES)).tolist()))
        drawings, texts = [{}] * (FRAMES * length + 1), []
        for i in range(length):
            plan = plan_actions(rng, places)
            places = {who: end for who, (_, _, end) in plan.items()}
            texts.append(write_paragraph(rng, room, plan))
            for t in range(FRAMES + 1):
                drawings[FRAMES * i + t] = {who: pose_at(t, FEET[who], *plan[who]) for who in plan}
        scenes.append(Scene(room, cast, first, length, tuple(texts), tuple(drawings)))
        first += length
    return Episode(seed, tuple(scenes), tuple(to_segments([scene.texts for scene in scenes])), colours, rooms)


def held_out(segments, seed=0):
    """A storyboard of the pocket world that training never sees, a list of Segments."""
    return list(episode(TEST_SEEDS + seed, segments).segments)


# Pictures are flat shapes with smooth edges. A shape is a function of pixels at x, y that gives the signed
# distance to its edge, negative inside, in picture heights.

def ellipse(x, y, x0, y0, rx, ry):
    return (np.hypot((x - x0) / rx, (y - y0) / ry) - 1) * min(rx, ry)


def box(x, y, left, top, right, bottom, corner=0.0):
    dx = np.abs(x - (left + right) / 2) - (right - left) / 2 + corner
    dy = np.abs(y - (top + bottom) / 2) - (bottom - top) / 2 + corner
    return np.hypot(dx.clip(0), dy.clip(0)) + np.maximum(dx, dy).clip(max=0) - corner


def line(x, y, x0, y0, x1, y1, thick):
    dx, dy = x1 - x0, y1 - y0
    along = (((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy)).clip(0, 1)
    return np.hypot(x - x0 - along * dx, y - y0 - along * dy) - thick / 2


def polygon(x, y, *corners):
    """Convex, clockwise."""
    sides = []
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
        sides.append(((y1 - y0) * (x - x0) - (x1 - x0) * (y - y0)) / np.hypot(x1 - x0, y1 - y0))
    return np.maximum.reduce(sides)


def draw(height, width, top, left, *groups):
    """float32 [height, width, 4], premultiplied, 0 ... 255. A group is [outline, (shape, colour, numbers)
    ...]: with an outline all its shapes come first that much larger in ink."""
    x = left + (np.arange(width, dtype=np.float32) + 0.5) / HEIGHT
    y = top + (np.arange(height, dtype=np.float32)[:, None] + 0.5) / HEIGHT
    rgba = np.zeros((height, width, 4), np.float32)
    for outline, *shapes in groups:
        drawn = [(shape(x, y, *numbers), colour) for shape, colour, *numbers in shapes]
        drawn = [(distance - outline, INK) for distance, _ in drawn if outline] + drawn
        for distance, colour in drawn:
            near = distance < 0.5 / HEIGHT
            cover = (0.5 - distance[near] * HEIGHT).clip(max=1)[:, None]
            rgba[near] += cover * (np.array([*colour, 255], np.float32) - rgba[near])
    return rgba


def mix(colour, other, amount):
    return tuple(a + (b - a) * amount for a, b in zip(colour, other))


FLAT, LINED = 0, 0.011                                     # outlines
INK, WHITE, WOOD, LEAF, PINK = (40, 34, 46), (250, 250, 250), (146, 104, 66), (96, 160, 84), (250, 170, 180)
GLASS, NIGHT, MOON, SUN = (150, 210, 250), (40, 48, 96), (255, 240, 170), (255, 236, 130)
BOOKS = (196, 84, 74), (90, 140, 180), (226, 190, 110), (110, 160, 110)
STEEL, STONE, GOLD = (214, 214, 220), (120, 110, 116), (250, 214, 90)
FLOORS = {"kitchen": (204, 168, 122), "bedroom": (150, 102, 72), "library": (116, 80, 106),
          "garden": (122, 132, 82)}
CORNERS = {"kitchen": 1.20, "bedroom": 0.32, "library": 1.26, "garden": 0.40}      # where the furniture is
SCENERY = {                                # what never changes, so that a room's name is enough to draw it
    "kitchen": [
        [LINED, (box, WHITE, 0.86, 0.10, 1.34, 0.46, 0.02)],
        [FLAT, (box, GLASS, 0.90, 0.14, 1.085, 0.42), (box, GLASS, 1.115, 0.14, 1.30, 0.42)],
        [LINED, (box, STEEL, -0.1, 0.48, 0.62, 0.74), (box, STONE, -0.1, 0.44, 0.66, 0.50)],
        [FLAT, (line, INK, 0.30, 0.53, 0.30, 0.72, 0.012), (ellipse, INK, 0.25, 0.61, 0.016, 0.016),
         (ellipse, INK, 0.35, 0.61, 0.016, 0.016)]],
    "bedroom": [
        [LINED, (box, WHITE, 0.14, 0.10, 0.56, 0.46, 0.02)],
        [FLAT, (box, NIGHT, 0.18, 0.14, 0.52, 0.42), (ellipse, MOON, 0.36, 0.28, 0.09, 0.09),
         (ellipse, NIGHT, 0.41, 0.25, 0.08, 0.08)],
        [LINED, (box, WOOD, 1.36, 0.36, 1.44, 0.76, 0.02), (box, WHITE, 0.82, 0.58, 1.40, 0.72, 0.03),
         (box, PINK, 1.20, 0.53, 1.36, 0.62, 0.04), (box, WOOD, 0.80, 0.52, 0.86, 0.76, 0.02)]],
    "library": [
        [LINED, (box, WOOD, 0.42, 0.06, 1.08, 0.72, 0.01)],
        [FLAT, *[(box, mix(WOOD, INK, 0.55), 0.46, top, 1.04, top + 0.16) for top in (0.10, 0.30, 0.50)]],
        [FLAT, *[(box, BOOKS[(i - i // 4) % 4], 0.48 + 0.14 * (i % 4), 0.13 + 0.2 * (i // 4),
                  0.59 + 0.14 * (i % 4), 0.26 + 0.2 * (i // 4)) for i in range(12)]]],
    "garden": [
        [FLAT, (ellipse, SUN, 0.20, 0.17, 0.10, 0.10), (box, WHITE, -0.1, 0.57, 1.6, 0.61),
         *[(box, WHITE, 0.05 + 0.19 * i, 0.50, 0.15 + 0.19 * i, 0.73, 0.03) for i in range(8)]],
        [LINED, (box, WOOD, 1.16, 0.40, 1.26, 0.75), (ellipse, LEAF, 1.21, 0.25, 0.24, 0.20)]]}


def furniture(kind, x, colour):
    """The big piece of furniture that an episode puts into a room, centred at x."""
    dark, shade = mix(colour, INK, 0.35), ((-0.09, 0.20), (0.09, 0.20), (0.17, 0.46), (-0.17, 0.46))
    boxes = {"armchair": [(colour, -0.15, 0.44, 0.15, 0.74, 0.07), (dark, -0.14, 0.64, 0.14, 0.78, 0.02),
                          (colour, -0.21, 0.58, -0.12, 0.80, 0.04), (colour, 0.12, 0.58, 0.21, 0.80, 0.04)],
             "table": [(dark, -0.17, 0.60, -0.12, 0.82), (dark, 0.12, 0.60, 0.17, 0.82),
                       (colour, -0.23, 0.54, 0.23, 0.64, 0.03)],
             "chest": [(colour, -0.18, 0.60, 0.18, 0.81, 0.02), (dark, -0.19, 0.51, 0.19, 0.63, 0.05),
                       (GOLD, -0.03, 0.59, 0.03, 0.67, 0.01)],
             "lamp": [(dark, -0.02, 0.45, 0.02, 0.80), (dark, -0.10, 0.77, 0.10, 0.81, 0.02)]}[kind]
    shapes = [(box, paint, x + left, top, x + right, *rest) for paint, left, top, right, *rest in boxes]
    return [LINED, *shapes] + [(polygon, colour, *[(x + dx, y) for dx, y in shade])] * (kind == "lamp")


@lru_cache(maxsize=64)
def draw_background(room, wall, kind, colour):
    """A room of an episode without its characters, uint8 [128, 192, 3]."""
    floor, piece = FLOORS[room], furniture(kind, CORNERS[room], FURNITURE_COLOURS[colour])
    empty = [FLAT, (box, WALL_COLOURS[wall], -1, -1, 3, 2), (box, floor, -1, 0.70, 3, 2),
             (box, mix(floor, INK, 0.4), -1, 0.688, 3, 0.708)]
    return draw(HEIGHT, WIDTH, 0, 0, empty, *SCENERY[room], piece)[..., :3].round().astype(np.uint8)


def limbs(colour, pose, hip, hip_y, shoulder, shoulder_y, reach, thick):
    """Legs and arms: legs swing when walking, an arm is up when waving, all are spread in the air."""
    kind, phase = pose.rstrip("0123"), int(pose[-1]) if pose[-1].isdigit() else 0
    swing = {"walk": 0.06 * np.sin(np.pi * phase / 2), "air": 0.05}.get(kind, 0.0)
    out, down = (reach, -reach / 2) if kind == "air" else (reach / 2, reach)
    hands = {side: (side * (shoulder + out), shoulder_y + down) for side in (-1, 1)}
    if kind == "wave":
        hands[1] = shoulder + 0.05 + (0.0, 0.04, 0.08, 0.04)[phase], shoulder_y - 1.2 * reach
    legs = [(side * hip, hip_y, side * (hip + swing), -thick / 2) for side in (-1, 1)]
    arms = [(side * shoulder, shoulder_y, *hands[side]) for side in (-1, 1)]
    return [(line, colour, *ends, thick) for ends in legs + arms]


def character(kind, colour, pose, side):
    """A tall cat with pointed ears or a small mouse with round ones, feet at (0, 0), looking to `side`."""
    pale = mix(colour, WHITE, 0.65)
    if kind == "cat":
        body = [(line, colour, -0.06 * side, -0.10, -0.17 * side, -0.16, 0.04),
                (line, colour, -0.17 * side, -0.16, -0.18 * side, -0.30, 0.04),
                *limbs(colour, pose, 0.05, -0.10, 0.07, -0.26, 0.09, 0.055),
                (polygon, colour, (-0.15, -0.42), (-0.125, -0.56), (-0.04, -0.42)),
                (polygon, colour, (0.04, -0.42), (0.125, -0.56), (0.15, -0.42)),
                (ellipse, colour, 0, -0.18, 0.095, 0.13),
                (ellipse, colour, 0.015 * side, -0.37, 0.135, 0.105)]
        marks = [(ellipse, pale, 0, -0.16, 0.055, 0.085), (ellipse, pale, 0.03 * side, -0.325, 0.06, 0.038)]
        eyes, nose = -0.39, (ellipse, INK, 0.035 * side, -0.335, 0.016, 0.012)
    else:
        body = [(line, colour, -0.08 * side, -0.06, -0.21 * side, -0.09, 0.022),
                *limbs(colour, pose, 0.05, -0.07, 0.08, -0.12, 0.06, 0.045),
                (ellipse, colour, -0.125, -0.29, 0.088, 0.088), (ellipse, colour, 0.125, -0.29, 0.088, 0.088),
                (ellipse, colour, 0, -0.11, 0.10, 0.09), (ellipse, colour, 0.01 * side, -0.20, 0.12, 0.105)]
        marks = [(ellipse, PINK, -0.13, -0.295, 0.05, 0.05), (ellipse, PINK, 0.13, -0.295, 0.05, 0.05),
                 (ellipse, pale, 0, -0.085, 0.06, 0.055)]
        eyes, nose = -0.215, (ellipse, INK, 0.075 * side, -0.15, 0.022, 0.018)
    for x in 0.03 * side - 0.04, 0.03 * side + 0.04:
        marks += [(ellipse, WHITE, x, eyes, 0.033, 0.040),
                  (ellipse, INK, x + 0.014 * side, eyes + 0.004, 0.016, 0.022)]
    return [LINED, *body], [FLAT, *marks, nose]


FEET_AT = 76.8, 32                                         # row and column of a sprite


@lru_cache(maxsize=1024)
def sprite(who, colour, pose, right):
    """A character in a pose, feet at FEET_AT: colours premultiplied by alpha [79, 64, 3] and 1 - alpha."""
    groups = character(CHARACTERS[who], CHARACTER_COLOURS[colour], pose, 1 if right else -1)
    rgba = draw(79, 64, -FEET_AT[0] / HEIGHT, -FEET_AT[1] / HEIGHT, *groups)
    return rgba[..., :3], 1 - rgba[..., 3:] / 255


def paste(picture, drawing, colours):
    """Draws {who: (x, y, pose, facing right)} in colours {who: name} into a picture uint8 [128, 192, 3]."""
    for who in sorted(drawing):                                               # Pip is smaller and in front
        x, y, pose, right = drawing[who]
        paint, clear = sprite(who, colours[who], pose, right)
        top, left = round(y * HEIGHT - FEET_AT[0]), round(x * HEIGHT - FEET_AT[1])
        under = picture[max(top, 0):top + len(paint), max(left, 0):left + len(paint[0])]
        seen = np.s_[max(-top, 0):, max(-left, 0):], np.s_[:under.shape[0], :under.shape[1]]
        under[:] = under * clear[seen[0]][seen[1]] + paint[seen[0]][seen[1]] + 0.5


def render_scene(episode, scene, height=HEIGHT):
    """uint8 [48 segments + 1, height, 1.5 height, 3]: a frame of the first drawing, four of each other."""
    pictures = np.stack([draw_background(scene.room, *episode.rooms[scene.room])] * len(scene.drawings))
    for picture, drawing in zip(pictures, scene.drawings):
        paste(picture, drawing, episode.colours)
    n = HEIGHT // height                                   # smaller ones are means over squares
    small = reduce(np.float32(pictures), "t (h a) (w b) c -> t h w c", "mean", a=n, b=n)
    return repeat((small + 0.5).astype(np.uint8), "t h w c -> (t fours) h w c", fours=FOURS)[FOURS - 1:]


def render(episode, height=HEIGHT, width=WIDTH):
    """The joined video, uint8 [48 S + 1, height, width, 3]. Cuts show at frames 48 i + 1."""
    clips = [render_scene(episode, scene, height) for scene in episode.scenes]
    return np.concatenate([clips[0], *[clip[1:] for clip in clips[1:]]])


def render_world(out, episodes, segments=21, seed=0):
    """Writes episodes as NAME.mp4 and NAME.json, to look at or to ingest."""
    Path(out).mkdir(parents=True, exist_ok=True)
    for number in tqdm(range(seed, seed + episodes), desc="render", unit="episode"):
        world, path = episode(number, segments), Path(out) / f"episode-{number:07d}.mp4"
        write_video(path, render(world))
        scenes = [{"start": SECONDS * scene.first, "end": SECONDS * (scene.first + scene.segments),
                   "place": scene.room, "segments": scene.texts} for scene in world.scenes]
        path.with_suffix(".json").write_text(json.dumps(scenes, indent=1) + "\n")


# 4. The pocket world's codec and text encoder, in place of the VAE and T5 ----------------------------------

class Residual(nn.Module):
    """x + conv(silu(conv(norm(x)))), the norm making each pixel a vector of length sqrt(width)."""

    def __init__(self, width, inner):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width, 1, 1))
        self.to_inner = nn.Conv2d(width, inner, 3, padding=1)
        self.to_width = nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x):
        norm = x.square().mean(1, keepdim=True).add(1e-4).rsqrt()
        return x + self.to_width(nn.functional.silu(self.to_inner(x * norm * self.gain)))


class PocketCodec(nn.Module):
    """Small video autoencoder: 8 x 8 in space, 4 in time with the first frame alone, 16 channels, as
    CogVideoX's VAE. Every group of four frames is coded by itself. It has seen nothing but the pocket world
    at 64 x 96: other videos come out soft. `scale` brings latents to standard deviation 1. Its weights were
    made at commit b6dda0d (train_codec), with noise on the latents: so decoding forgives a model's errors."""
    channels, height, width = 16, 64, 96

    def __init__(self, path=Path(__file__).parent / "assets" / "pocket_codec.safetensors"):
        super().__init__()
        up = lambda width, out: nn.Sequential(nn.Conv2d(width, 4 * out, 1), nn.PixelShuffle(2))
        down = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * 96, 112, 1))
        self.encoder = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(192, 96, 1), Residual(96, 48), down,
                                     Residual(112, 48), nn.Conv2d(112, self.channels, 1))
        self.decoder = nn.Sequential(nn.Conv2d(self.channels, 112, 3, padding=1), Residual(112, 56),
                                     up(112, 64), Residual(64, 48), up(64, 32), Residual(32, 32), up(32, 12))
        with reading(path), safe_open(path, "pt") as file:
            self.scale = float(file.metadata()["scale"])
            self.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})
            self.name = f"pocket-codec-{short_hash(path.read_bytes())}"

    @torch.no_grad()
    def encode(self, frames, batch=16):
        """uint8 frames [4 k + 1, H, W, 3], numpy or torch -> float32 latents [k + 1, 16, H / 8, W / 8]."""
        frames = torch.as_tensor(frames)
        frames = torch.cat([frames[:1]] * (FOURS - 1) + [frames])                # the first one is repeated
        parts = []
        for four in rearrange(frames, "(k t) h w c -> k (t c) h w", t=FOURS).split(batch):
            four = (four.float() / 255 - 0.5).contiguous(memory_format=torch.channels_last)
            parts.append(self.encoder(four))
        return torch.cat(parts).contiguous() * self.scale

    @torch.no_grad()
    def decode(self, latents, batch=16):
        """Latents [T, 16, h, w] -> uint8 frames [4 (T - 1) + 1, 8 h, 8 w, 3] as numpy."""
        parts = [self.decoder(part / self.scale) for part in latents.float().split(batch)]
        pixels = ((torch.cat(parts) + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)
        return rearrange(pixels, "k (t c) h w -> (k t) h w c", c=3)[FOURS - 1:].numpy()


@lru_cache(maxsize=100_000)
def word_vector(word, dim):
    """A fixed Gaussian vector for any word, the same on every machine."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(dim).astype(np.float32)


class PocketText:
    """The text encoder in place of T5: half of a token's channels are its word's fixed vector, the other half
    a fading memory of the words before it, so that "left" knows who is on the left; then its position."""
    fade = 0.8
    said = f"{ROOMS} {CHARACTERS} {VERBS} {AT} {FILLERS} in the here is we see and while meanwhile from to"
    known = {START, END, *re.findall("[a-z]+", said.lower())}

    def __init__(self, length=40, dim=64):
        self.length, self.dim, self.name = length, dim, f"pocket-words-2-{length}x{dim}"
        angle = np.arange(length)[:, None] * 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
        positions = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)     # of Attention Is All You Need
        self.positions = 0.5 * positions.astype(np.float32)

    def words(self, text):
        return re.findall(rf"{START}|{END}|[^\W_]+(?:['’][^\W_]+)*", text.lower())

    def encode(self, texts, where="storyboard"):
        """Paragraphs, one a segment -> float32 [S, N, dim], zeros after the last word."""
        out = np.zeros((len(texts), self.length, self.dim), np.float32)
        unmarked = " ".join(texts).replace(START, " ").replace(END, " ").strip()
        new = [word not in self.known for word in self.words(unmarked)] or [unmarked != ""]
        if np.mean(new) > 0.5:
            warn(f"{where}: {np.mean(new):.0%} of the words are unknown to the pocket world")
        for i, text in enumerate(texts):
            memory = np.zeros(self.dim // 2, np.float32)
            words = cut_words(self.words(text), self.length, 1, f"{where}, segment {i + 1}")
            for n, word in enumerate(words):
                vector = word_vector(word, self.dim // 2)
                out[i, n] = np.concatenate([vector, memory]) + self.positions[n]
                memory = self.fade * memory + np.sqrt(1 - self.fade ** 2) * vector
        return torch.from_numpy(out)


def cut_words(words, length, ending, where):
    """At most `length` words: what is too many goes before the last `ending` ones, with a warning."""
    if len(words) <= length:
        return words
    warn(f"{where}: {len(words)} words, cut to {length}")
    return words[:length - ending] + words[-ending:]


# 5. CogVideoX's VAE and T5 (4.1) ----------------------------------------------------------------------------

def load_pretrained(kind, folder, part, device=None):
    """What diffusers or transformers read from CogVideoX's folder, or from that of the part alone: the
    tokenizer or, onto a device, a network, in bf16 on a GPU. Only safetensors: other formats may run code."""
    settings = dict(subfolder=part if part in os.listdir(folder) else "", local_files_only=True)
    if device is None:
        return kind.from_pretrained(str(folder), **settings)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    settings |= dict(torch_dtype=dtype, use_safetensors=True, output_loading_info=True)
    network, found = kind.from_pretrained(str(folder), **settings)
    assert not found["missing_keys"], f"it lacks {min(found['missing_keys'])}"
    return network.to(device).eval().requires_grad_(False)


class CogVideoXCodec:
    """CogVideoX's VAE: 8 x 8 in space, 4 in time with the first frame alone. `scale` multiplies its latents:
    the VAE's own scaling_factor (0.7 at 5B) unless given, 1 in the paper."""
    name = "cogvideox-vae"

    def __init__(self, folder, scale=None, device="cpu"):
        with reading(f"{folder}: CogVideoX's vae"):
            from diffusers import AutoencoderKLCogVideoX
            self.vae = load_pretrained(AutoencoderKLCogVideoX, folder, "vae", device)
        config = self.vae.config
        self.channels = config.latent_channels
        self.height, self.width = config.sample_height, config.sample_width
        self.scale = float(config.scaling_factor if scale is None else scale)

    @torch.no_grad()
    def encode(self, frames):
        """uint8 frames [4 k + 1, H, W, 3], numpy or torch -> float32 means [k + 1, C, H / 8, W / 8]."""
        frames = torch.as_tensor(frames).to(self.vae.device, self.vae.dtype)
        latents = self.vae.encode(rearrange(frames, "t h w c -> 1 c t h w") / 127.5 - 1).latent_dist.mode()
        return rearrange(latents, "1 C t h w -> t C h w").float().cpu() * self.scale

    @torch.no_grad()
    def decode(self, latents):
        """Latents [T, C, h, w] -> uint8 frames [4 (T - 1) + 1, 8 h, 8 w, 3] as numpy."""
        latents = rearrange(latents / self.scale, "t C h w -> 1 C t h w").to(self.vae.device, self.vae.dtype)
        frames = rearrange(self.vae.decode(latents).sample.cpu(), "1 c t h w -> t h w c").float()
        return frames.add_(1).mul_(127.5).round_().clamp_(0, 255).byte().numpy()


class T5Text:
    """CogVideoX's text encoder, T5: one paragraph a segment, padded to `length` tokens; as in CogVideoX
    padding is attended. The scene marks are two new tokens, of normal numbers as large as T5's own."""

    def __init__(self, folder, length=226, device="cpu"):
        with reading(f"{folder}: CogVideoX's text_encoder and tokenizer"):
            from transformers import AutoTokenizer, T5EncoderModel
            self.model = load_pretrained(T5EncoderModel, folder, "text_encoder", device)
            self.tokenizer = load_pretrained(AutoTokenizer, folder, "tokenizer")
            assert len({*self.tokenizer("a cat and a mouse")["input_ids"]}) > 3, "it has no words"
        self.length, self.dim = length, self.model.config.d_model
        self.name = f"t5-{length}x{self.dim}"
        self.tokenizer.add_tokens([START, END], special_tokens=True)
        ids = self.tokenizer.convert_tokens_to_ids([START, END])
        words = self.model.get_input_embeddings().weight
        if max(ids) >= len(words):
            self.model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        marks = torch.randn(2, self.dim, generator=torch.Generator().manual_seed(0)) * words.std().item()
        self.model.get_input_embeddings().weight.data[ids] = marks.to(words)

    @torch.no_grad()
    def encode(self, texts, where="storyboard"):
        """Paragraphs, one a segment -> float32 [S, N, dim]; a longer one is cut, and named."""
        out = []
        for number, text in enumerate(texts, 1):
            ids = self.tokenizer(text)["input_ids"]                     # the end of the text among them
            ids = cut_words(ids, self.length, 1 + text.endswith(END), f"{where}, segment {number}")
            ids = ids + [self.tokenizer.pad_token_id] * (self.length - len(ids))
            out.append(self.model(torch.tensor([ids], device=self.model.device))[0].float().cpu())
        return torch.cat(out)


def encoder_names(codec, text_encoder):
    """What weights and latents record of the encoders that they were made with."""
    return {"codec": codec.name, "scale": codec.scale, "text_encoder": text_encoder.name}


def open_encoders(vae=None, text_encoder=None, vae_scale=None, text_len=None, device="cpu", expected=None):
    """(codec, text encoder): CogVideoX's from the folders that are given, else the pocket world's. `text_len`
    tokens a segment are 226 or 40 unless given. `expected`: encoder_names of weights or latents; UserError if
    one differs, as each encoder's numbers are its own."""
    codec = CogVideoXCodec(vae, vae_scale, device) if vae else PocketCodec()
    text = T5Text(text_encoder, text_len or 226, device) if text_encoder else PocketText(text_len or 40)
    names = encoder_names(codec, text)
    expected = names | (expected or {})
    wrong = [f"{kind} {expected[kind]}, not {names[kind]}" for kind in names if expected[kind] != names[kind]]
    check(not wrong, f"the data or weights were made with {'; '.join(wrong)}: name these encoders, "
                     "CogVideoX's by --vae FOLDER, --vae_scale and --text_encoder FOLDER")
    return codec, text


def add_encoder_flags(parser):
    add = parser.add_argument
    add("--vae", metavar="FOLDER", help="CogVideoX's folder, or its VAE's, in place of the pocket codec")
    add("--vae_scale", type=float, metavar="X", help="of its latents (default: its own; the paper's is 1)")
    add("--text_encoder", metavar="FOLDER", help="CogVideoX's folder: T5 in place of pocket words")


# 6. Videos to latents on disk (3.3) -------------------------------------------------------------------------

FORMAT = f"ttt-minute latents 2, segments of {SEGMENT} frames"
VIDEO_SUFFIXES = ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .wmv .flv .ogv .gif".split()
SLACK = 3                                   # frames that may be missing at the end: rounding of the duration


def open_folder(out, codec, text_encoder):
    """Makes the folder `out` unless it is somebody else's; what its index says of all files."""
    index = Path(out) / "index.json"
    index.parent.mkdir(parents=True, exist_ok=True)
    ours = not index.exists() or '"format": "ttt-minute' in read_text(index)
    check(ours, f"{index} was not made by dataset.py; take another folder for --out")
    latents = [FRAMES + 1, codec.channels, codec.height // 8, codec.width // 8]
    return {"format": FORMAT, **encoder_names(codec, text_encoder), "fps": FPS, "latents": latents,
            "text": [text_encoder.length, text_encoder.dim]}


def read_metadata(path):
    """What a file of latents says of itself; nothing if it is not there or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def write_latents(path, origin, latents, scenes, text_encoder):
    """Latents of segments [13, C, h, w] and scenes (paragraphs, place) -> one file."""
    texts, places = [], []
    for paragraphs, place in scenes:
        texts += mark_scene(paragraphs)
        places += [place] * len(paragraphs)
    tensors = {"latents": torch.stack(latents).half(), "text": text_encoder.encode(texts, path.stem).half()}
    check(all(x.isfinite().all() for x in tensors.values()), f"{path.stem}: not finite in latents or text")
    facts = {"scenes": json.dumps([scene[0] for scene in scenes]), "places": json.dumps(places)}
    with atomic(path) as partial:
        save_file(tensors, partial, origin | facts)


def write_index(out, made_with, paths):
    """index.json: what the folder holds, of these files those that were made in this way."""
    videos = []
    for path in paths:
        found = read_metadata(path)
        if found.get("made_with") == json.dumps(made_with):
            places = json.loads(found["places"])
            videos.append({"file": path.name, "segments": len(places), "places": places})
    with atomic(Path(out) / "index.json") as partial:
        partial.write_text(json.dumps({**made_with, "videos": videos}, indent=1) + "\n")


def make_world(folder, episodes, segments=21):
    """The pocket world's first episodes as latents in `folder`, from the renderer. What is there is kept."""
    codec, text_encoder = PocketCodec(), PocketText()
    made_with = open_folder(folder, codec, text_encoder)
    paths = [Path(folder) / f"episode-{seed:07d}.safetensors" for seed in range(episodes)]
    origin = {"source": f"pocket world, {segments} segments", "made_with": json.dumps(made_with)}

    def work(seed):
        if not origin.items() <= read_metadata(paths[seed]).items():
            world, latents = episode(seed, segments), []
            for scene in world.scenes:
                z = codec.encode(render_scene(world, scene, codec.height))
                latents += [z[FRAMES * i:FRAMES * (i + 1) + 1] for i in range(scene.segments)]
            story = [(scene.texts, scene.room) for scene in world.scenes]
            write_latents(paths[seed], origin, latents, story, text_encoder)

    with ThreadPoolExecutor(2) as pool:
        list(tqdm(pool.map(work, range(episodes)), total=episodes, desc="pocket world", unit="episode"))
    write_index(folder, made_with, paths)


def read_cuts(board):
    """NAME.json -> [(first frames of its segments, paragraphs, place)], a scene each, trimmed alike at both
    ends to whole segments."""
    cuts, last = [], 0
    with reading(board.name):
        scenes = json.loads(read_text(board))
        assert isinstance(scenes, list), f"it must be a list of scenes, not {str(scenes)[:50]!r}"
    for number, scene in enumerate(scenes, 1):
        with reading(f"{board.name}, scene {number}, {str(scene)[:50]!r}"):
            begin, end = (round(FPS * float(scene[key])) for key in ("start", "end"))
            assert last <= begin < end, f"must start at {last / FPS:g} s or later and end after that"
            texts = [one_line(text.replace(START, " ").replace(END, " ")) for text in scene["segments"]]
            count, last, place = (end - begin) // SEGMENT, end, scene.get("place")
            assert len(texts) == count, f"it makes {count} segments, but has {len(texts)} texts"
            assert all(texts), "a paragraph is empty"
            begin += (end - begin) % SEGMENT // 2
            starts = range(begin, begin + SEGMENT * count, SEGMENT)
            cuts.append((starts, texts, place if place is None else one_line(place)))
    return cuts


def read_frames(video, start, height, width):
    """uint8 [49, height, width, 3], a segment and the frame after it, from frame `start` at 16 fps on, in
    square pixels: scaled to cover the size, then cropped around the centre. UserError if ffmpeg cannot."""
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)       # it warns of every change of size
    exact = "area+accurate_rnd+full_chroma_int+full_chroma_inp"       # the default halves colours' resolution
    filters = (f"fps={FPS}:start_time=0,scale=w='max({width},{height}*dar)':h='max({height},{width}/dar)':"
               f"flags={exact},crop={width}:{height}")
    with reading("its pictures"):
        frames = imageio_ffmpeg.read_frames(
            str(video.absolute()), input_params=["-ss", str(start / FPS)],
            output_params=["-map", "0:V:0", "-vf", filters, "-frames:v", str(SEGMENT + 1)])
        frames = [np.frombuffer(data, np.uint8) for data in islice(frames, 1, None)]      # after what it is
    missing = SEGMENT + 1 - len(frames)
    check(missing <= SLACK, f"it ends or stops decoding before {(start + SEGMENT) / FPS:.1f} s")
    return np.stack(frames + frames[-1:] * missing).reshape(-1, height, width, 3)


def ingest(videos, out, codec, text_encoder):
    """Videos of a folder, NAME.mp4 with NAME.json, to latents in another. What is there is kept. A bad video
    does not stop the others; a UserError at the end names all of them."""
    files = sorted(path for path in Path(videos).iterdir() if path.name[0] != ".")
    names = {path: unicodedata.normalize("NFC", path.stem) for path in files}      # disks have two forms
    boards = {names[path]: path for path in files if path.suffix.lower() == ".json"}
    paths = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    check(paths, f"{videos}: no videos in this folder")
    made_with, problems = open_folder(out, codec, text_encoder), []
    for video in tqdm(paths, desc="ingest", unit="video"):
        try:
            name, stat = names[video], video.stat()
            check(name in boards, f"has no storyboard, {video.stem}.json must be beside it")
            story, target = short_hash(boards[name].read_bytes()), Path(out) / f"{name}.safetensors"
            source = f"{stat.st_size} bytes of {stat.st_mtime_ns} ns, storyboard {story}"
            origin = {"source": source, "made_with": json.dumps(made_with)}
            if not origin.items() <= read_metadata(target).items():
                cuts, latents = read_cuts(boards[name]), []
                for start in chain(*[starts for starts, _, _ in cuts]):
                    frames = read_frames(video, start, codec.height, codec.width)
                    latents.append(codec.encode(frames).half())
                write_latents(target, origin, latents, [cut[1:] for cut in cuts], text_encoder)
        except (UserError, OSError, SafetensorError) as error:
            problems.append(f"{video.name}: {error}")
            warn(f"left out: {problems[-1]}")
    write_index(out, made_with, sorted(Path(out).glob("[!.]*.safetensors")))
    check(not problems, f"{len(problems)} of {len(paths)} videos were left out: " + "; ".join(problems))


# 7. The loader ----------------------------------------------------------------------------------------------

def returns(places):
    """Whether a place comes back after another one: A B A, A A B C A."""
    changes = [place for place, before in zip(places, [object(), *places]) if place != before]
    return len(changes) > len(set(changes)) and None not in places


class Runs:
    """Every run of `segments` consecutive segments of the videos in `folder`; len() counts them. If there are
    runs in which a place returns, only these. UserError: no such data, a damaged file, no video long enough.
    .runs [(video, its first segment)], .encoders: encoder_names of those that made the latents, .sizes
    {channels, height, width (of latents), text_len, text_dim}."""

    def __init__(self, folder, segments):
        self.folder, self.segments, self.tensors, runs = Path(folder), segments, [], []
        with reading(f"{folder}/index.json, made by dataset.py --ingest"):
            index = json.loads((self.folder / "index.json").read_text())
            assert index["format"] == FORMAT, f"its format is not {FORMAT}: ingest the videos again"
            self.encoders = {kind: index[kind] for kind in ("codec", "scale", "text_encoder")}
            sizes = [*index["latents"][1:], *index["text"]]
            self.sizes = dict(zip(("channels", "height", "width", "text_len", "text_dim"), sizes))
            self.videos = index["videos"]
        for i, video in enumerate(self.videos):
            with reading(f"{self.folder / video['file']} (ingest it again)"):
                file = safe_open(self.folder / video["file"], "pt")
                self.tensors.append([file.get_slice(name) for name in ("latents", "text")])
            runs += [(i, start) for start in range(video["segments"] - segments + 1)]
        longest = max([video["segments"] for video in self.videos], default=0)
        check(runs, f"{folder}: no video has {segments} segments, the longest has {longest}")
        places = [video["places"] for video in self.videos]
        self.runs = [(i, start) for i, start in runs if returns(places[i][start:start + segments])] or runs

    def __len__(self):
        return len(self.runs)

    def storyboard(self, number):
        """The Segments of a run."""
        i, start = self.runs[number]
        scenes = json.loads(read_metadata(self.folder / self.videos[i]["file"])["scenes"])
        return to_segments(scenes)[start:start + self.segments]

    def run(self, number):
        """latents float16 [12 S + 1, C, h, w], text [S, N, dim]: later segments drop their first latent."""
        i, start = self.runs[number]
        latents, text = (x[start:start + self.segments] for x in self.tensors[i])
        return torch.cat([latents[0, :1], rearrange(latents[:, 1:], "S t C h w -> (S t) C h w")]), text

    def batch(self, indices):
        """latents float32 [B, 12 S + 1, C, h, w] and text float32 [B, S, N, dim] of these runs."""
        latents, texts = zip(*[self.run(number) for number in indices])
        return torch.stack(latents).float(), torch.stack(texts).float()


# 8. Pictures and video out ----------------------------------------------------------------------------------

def write_video(path, frames):
    """Writes uint8 frames [n, height, width, 3] as an mp4 that any player opens."""
    imageio.mimwrite(path, frames, fps=FPS, quality=6.6, macro_block_size=8)


def resize(frames, factor):
    """uint8 frames [n, h, w, 3] -> [n, factor h, factor w, 3], smoothly."""
    size = round(frames.shape[2] * factor), round(frames.shape[1] * factor)
    return np.stack([Image.fromarray(frame).resize(size, Image.LANCZOS) for frame in frames])


def contact_sheet(frames, board, path, columns=6):
    """A picture of the video: a row a scene, its first words and frames."""
    from matplotlib.figure import Figure
    scenes = [list(own) for _, own in groupby(range(len(board)), lambda i: board[i].scene)]
    sheet = Figure((12, 1.75 * len(scenes)), layout="constrained")
    for row, own in zip(sheet.subfigures(len(scenes), squeeze=False)[:, 0], scenes):
        words = board[own[0]].text.removeprefix(START).removesuffix(END)
        row.suptitle(textwrap.shorten(words, 150), x=0.01, ha="left", size=9, parse_math=False)
        first = SEGMENT * own[0] + 1                          # frame 48 i is still the segment before's
        moments = np.linspace(first, SEGMENT * (own[-1] + 1), columns).round().astype(int)
        for axes, moment in zip(row.subplots(1, columns), moments):
            axes.imshow(frames[moment])
            axes.set(xticks=[], yticks=[], xlabel=f"{moment / FPS:.1f} s")
    sheet.savefig(path)


def save_video(frames, board, path):
    """Writes path (.mp4), and beside it the same as .gif (8 frames a second) and a contact sheet as .png."""
    factor = max(1, round(384 / frames.shape[2]))
    write_video(path, resize(frames, factor))
    smaller = resize(frames[::2], max(1, factor // 2))
    imageio.mimwrite(path.with_suffix(".gif"), smaller, duration=2000 / FPS, loop=0)
    contact_sheet(frames, board, path.with_suffix(".png"))


@contextmanager
def plot(path, **labels):
    """Axes to draw on; the plot is written at the end."""
    from matplotlib.figure import Figure
    figure = Figure((7, 4))
    axes = figure.subplots()
    yield axes
    axes.set(**labels)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def plot_loss(folder):
    """loss.png from a stage's log.jsonl."""
    lines = map(json.loads, (folder / "log.jsonl").open())
    loss = np.array(list({line["step"]: line["loss"] for line in lines}.values()))      # steps taken again: the last
    window = max(1, len(loss) // 20)
    mean = np.convolve(loss, np.ones(window) / window, mode="valid")
    labels = dict(xlabel="step", ylabel="loss (mean squared error of v)", ylim=(0, None))
    with plot(folder / "loss.png", title=f"{folder.parent.name}, stage {folder.name}", **labels) as axes:
        axes.plot(loss, color="0.8", linewidth=0.8, label="each step")
        axes.plot(np.arange(window - 1, len(loss)), mean, color="tab:blue", label=f"mean of {window} steps")


# 9. The command line ----------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description="The pocket world, and real videos, as data to train on.")
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--render", type=positive, metavar="N", help="write N episodes of the pocket world into --out")
    add("--ingest", metavar="VIDEOS", help="take a folder of NAME.mp4 and NAME.json to latents in --out")
    add("--storyboard", type=seed_number, metavar="SEED", help="print a storyboard that training never sees")
    add = parser.add_argument
    add("--out", metavar="DIR", help="the folder to write to")
    add_encoder_flags(parser)
    add("--text_len", type=positive, metavar="N", help="tokens of a segment (default: 40, with T5 226)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of VAE and T5")
    add("--segments", type=whole_number(1, 21), default=21, metavar="S", help="of an episode (default: 21)")
    add("--seed", type=whole_number(0, TEST_SEEDS - 1), default=0, help="of the first episode (default: 0)")
    args = parser.parse_args()
    if (args.render or args.ingest) and not args.out:
        parser.error("--out DIR is missing, the folder to write to")
    if args.render:
        render_world(args.out, args.render, args.segments, args.seed)
    elif args.ingest:
        settings = args.vae, args.text_encoder, args.vae_scale, args.text_len, args.device
        ingest(args.ingest, args.out, *open_encoders(*settings))
    else:
        print("\n\n".join(segment.text for segment in held_out(args.segments, args.storyboard)))


if __name__ == "__main__":
    run_main(main)
