"""Storyboards, the pocket world, and the way every video takes to the disk.

    python dataset.py --render 8 --out videos            # episodes of the pocket world: NAME.mp4 with NAME.json
    python dataset.py --ingest videos --out data         # those, or your own videos, to latents and text embeddings
    python dataset.py --storyboard 7 --segments 3        # a storyboard that training never sees, to edit and to sample
    python dataset.py --ingest videos --out data --vae COGVIDEOX --text_encoder COGVIDEOX      # by CogVideoX's VAE and T5
    python dataset.py --train_codec                      # makes assets/pocket_codec.safetensors again; --height 128 for larger pictures

What ingestion reads: `NAME.mp4` (or anything ffmpeg reads) and beside it `NAME.json`, a list of scenes

    [{"start": 0.0, "end": 9.5, "segments": ["In the kitchen ...", "Mia runs ...", "Pip waves ..."]}, ...]

with times in seconds and one paragraph for every whole 3 seconds of the scene. A scene may also name its "place", any word: training
on several segments then takes stories in which a place returns after another, for these are what memory is for.

What it writes: `NAME.safetensors` with `latents` float16 [S, 13, C, h, w] and `text` float16 [S, N, dim] (segment i: the
latents of its 48 frames and the frame after them, the embedding of its paragraph), with T5 also `marks` [2, dim], what the
two scene marks were embedded as; metadata beside them (format, codec, scale, text_encoder, source, fps, scenes, places); and one
`index.json` that says what all files share and how long each one is.

| 1 | small shared things | errors, flags, atomic writes |
| 2 | storyboards         | Format 3, the official JSON (3.2) |
| 3 | the pocket world    | a cartoon with a ground truth |
| 4 | the codec           | in place of the VAE, and how it was trained |
| 5 | the text encoder    | in place of T5 |
| 6 | CogVideoX's own two | VAE and T5, by diffusers and transformers (4.1) |
| 7 | real videos         | scenes -> 3-second segments -> latents (3.3) |
| 8 | the loader          | runs of consecutive segments |
| 9 | the command line    | |

Sections of the paper are those of arXiv 2504.05298v1.
"""

import argparse
import difflib
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

FPS = 16                    # frames a second (3.1)
SECONDS = 3                 # of a segment
SEGMENT = FPS * SECONDS     # 48 frames
FOURS = 4                   # frames in a latent frame; the first frame of a video has one alone


# 1. Small shared things -----------------------------------------------------------------------------------


class UserError(ValueError):
    """The user's mistake, in one sentence: what is wrong, where, what to do. Exit status 2."""


def nearest(word, known):
    """', did you mean ...?' for the known word nearest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {match[0]}?" if match else ""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one sentence (exit status 2) that name the nearest known flag or value."""

    def __init__(self, *args, **kwargs):
        def wide(prog):
            return argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110)
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": wide, **kwargs})

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for flag in (word.split("=")[0] for word in args):
            if re.match(r"--?[A-Za-z]", flag) and flag not in self._option_string_actions:
                self.error(f"unknown flag {flag}{nearest(flag, self._option_string_actions)}")
        return super().parse_args(args, namespace)

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action, f"unknown value {value}{nearest(str(value), choices)} (known: {', '.join(choices)})")

    def error(self, message):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def run_main(main):
    """Calls `main()` and exits: 0 done, 2 the user's mistake, 130 interrupted, 1 (and a traceback) anything else."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def short_hash(data):
    """12 hexadecimal digits that stand for these bytes."""
    return hashlib.sha256(data).hexdigest()[:12]


@contextmanager
def atomic(path):
    """Yields a temporary path beside `path`, with its suffix, and renames it onto `path` if all goes well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


def in_parallel(work, items, what, unit, total=None, threads=2):
    """Calls `work(item, advance)` for every item on threads, and `advance()` moves the progress bar on; the first exception
    cancels the rest."""
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(items) if total is None else total, desc=what, unit=unit) as bar:
        jobs = [pool.submit(work, item, bar.update) for item in items]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


# 2. Storyboards (3.2) ---------------------------------------------------------------------------------------

START, END = "<start_scene>", "<end_scene>"


@dataclass(frozen=True)
class Segment:
    """What happens in three seconds: the text with its scene marks, what to avoid, and which scene it is in."""
    text: str
    negative: str | None
    scene: int


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_json(text, where):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON, {error.msg} at line {error.lineno}, column {error.colno}") from None


def check_marks(text, where):
    """Anything that looks like a scene mark and is not one: `<start_sceen>`, `Send_scene`, `<END_SCENE>`."""
    rest = text.replace(START, "").replace(END, "")
    for word in re.findall(r"<[^<>\n]{1,24}>|[<\[({/]*\w*_\w*[>\])}]*|<\w+|\w+>", rest):
        match = difflib.get_close_matches(word.lower(), [START, END], n=1, cutoff=0.7)
        if match:
            raise UserError(f"{where}: {word} is not a scene mark, did you mean {match[0]}?")


def mark_scene(paragraphs):
    """The paragraphs of one scene as the text encoder reads them: marks around the first and the last."""
    last = len(paragraphs) - 1
    return [START * (i == 0) + text + END * (i == last) for i, text in enumerate(paragraphs)]


def parse_format_3(text, name):
    """One video: the pieces between marks and blank lines are its paragraphs, and every one is inside a scene."""
    blocks = re.split(r"\n\s*\n", text.replace(START, "").replace(END, "").strip())
    for number, block in enumerate(blocks, 1):
        check_marks(block, f"{name}, paragraph {number}")
    if START not in text and END not in text:
        raise UserError(f"{name}: no scene marks, write {START} before a scene's first paragraph and {END} after its last")
    scenes, opened = [], None                                       # a scene is a list of paragraphs
    for piece in re.split(rf"({START}|{END}|\n\s*\n)", text):
        piece, number = " ".join(piece.split()), sum(map(len, scenes)) + 1
        where = f"{name}, paragraph {number}"
        if piece == START:
            if opened:
                raise UserError(f"{where}: {START} inside the scene of paragraph {opened}, which no {END} has ended")
            scenes.append([])
            opened = number
        elif piece == END:
            if not opened:
                raise UserError(f"{name}, paragraph {max(number - 1, 1)}: {END} without a {START} before it")
            if not scenes[-1]:
                raise UserError(f"{where}: a scene without text")
            opened = None
        elif piece:
            if not opened:
                raise UserError(f"{where}: a paragraph outside any scene, begin it with {START}")
            scenes[-1].append(piece)
    if opened:
        raise UserError(f"{name}, paragraph {opened}: the scene that begins here has no end, close it with {END}")
    return [Segment(text, None, number) for number, scene in enumerate(scenes) for text in mark_scene(scene)]


def parse_official(video, name):
    """One video of the official format: a list of {text, requires_scene_transition, neg_text}."""
    if not isinstance(video, list) or not video:
        raise UserError(f"{name}: a video must be a list of segments that is not empty")
    scenes, after_end = [], False
    for number, segment in enumerate(video, 1):
        where = f"{name}, segment {number}"
        text, negative, cut = check_segment(segment, where)
        if number == 1 or cut or text.startswith(START) or after_end:
            scenes.append([])
        after_end = text.endswith(END)
        text = " ".join(text.removeprefix(START).removesuffix(END).split())
        if START in text or END in text:
            raise UserError(f"{where}: a scene mark in the middle of the text")
        if not text:
            raise UserError(f"{where}: the prompt is empty")
        scenes[-1].append((text, negative))
    # DIFF: the official sampler leaves the video's first start mark and last end mark out; Format 3 has them, so we do.
    return [Segment(text, negative, number) for number, scene in enumerate(scenes)
            for text, (_, negative) in zip(mark_scene([text for text, _ in scene]), scene)]


def check_segment(segment, where):
    """(text, negative, requires_scene_transition) of a segment object, types checked."""
    fields = {"text": (str,), "requires_scene_transition": (bool,), "neg_text": (str, type(None))}
    if not isinstance(segment, dict):
        raise UserError(f"{where}: a segment must be an object with the field text")
    for field, value in segment.items():
        if field not in fields:
            raise UserError(f"{where}: unknown field {field}{nearest(field, fields)}")
        if not isinstance(value, fields[field]):
            raise UserError(f"{where}: {field} must be {'true or false' if bool in fields[field] else 'text'}")
    if "text" not in segment:
        raise UserError(f"{where}: the field text is missing")
    check_marks(segment["text"], where)
    negative = (segment.get("neg_text") or "").strip() or None
    return segment["text"].strip(), negative, segment.get("requires_scene_transition", False)


def parse_storyboard(path):
    """Reads a storyboard: a list of videos, each a list of `Segment` (one for every three seconds).

    `.txt` is Format 3 (one video), `.json` the official list of videos, `.jsonl` one video a line.
    Raises UserError, naming the file and the paragraph, line or segment.
    """
    name, suffix = Path(path).name, Path(path).suffix.lower()
    if suffix not in (".txt", ".json", ".jsonl"):
        raise UserError(f"{name}: a storyboard is .txt (Format 3), .json or .jsonl")
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{name}: the storyboard is empty")
    if suffix == ".txt":
        return [parse_format_3(text, name)]
    if suffix == ".jsonl":
        lines = [(f"{name}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [parse_official(read_json(line, where), where) for where, line in lines]
    videos = read_json(text, name)
    if not isinstance(videos, list) or not videos or isinstance(videos[0], dict):
        raise UserError(f"{name}: must be a list of videos, each a list of segments: [[{{...}}, {{...}}]]")
    return [parse_official(video, f"{name}, video {number}") for number, video in enumerate(videos, 1)]


# 3. The pocket world ----------------------------------------------------------------------------------------
# Text tells the room, who is there and what they do. Everything named in a palette below is drawn once an
# episode and never told, so a room or a character that comes back looks the same only to a model that remembers.

ROOMS = {"kitchen": "with its window and counter", "bedroom": "with its bed and the moon outside",
         "library": "with its tall bookshelf", "garden": "with its tree and white fence"}
CHARACTERS = {"Mia": "cat", "Pip": "mouse"}
CHARACTER_COLOURS = {"red": (220, 50, 50), "yellow": (250, 205, 40), "green": (50, 165, 70),
                     "cyan": (50, 195, 210), "blue": (55, 85, 220), "magenta": (205, 65, 195)}
WALL_COLOURS = {"rose": (244, 172, 172), "sand": (247, 224, 150), "mint": (172, 226, 178),
                "sky": (164, 208, 246), "lilac": (204, 180, 240), "pearl": (234, 234, 230)}
FLOORS = {"kitchen": (204, 168, 122), "bedroom": (150, 102, 72), "library": (116, 80, 106), "garden": (122, 132, 82)}
FURNITURE_COLOURS = {"navy": (44, 58, 120), "crimson": (150, 34, 50), "forest": (30, 96, 62),
                     "ochre": (206, 146, 40), "ivory": (242, 238, 228), "violet": (112, 60, 142)}
FURNITURE = ("armchair", "table", "chest", "lamp")
HEIGHT, WIDTH = 128, 192                                   # of the rendered videos; a codec reads them smaller
DRAWINGS = SEGMENT // FOURS                                # the cartoon is animated on fours: a drawing lasts four frames
PLACES = {"left": 0.375, "middle": 0.75, "right": 1.125}   # of characters; lengths are in picture heights, 1 x 1.5
CORNERS = {"kitchen": 1.20, "bedroom": 0.32, "library": 1.26, "garden": 0.40}      # where a room has its furniture
SPEED = {"walk": 0.375, "run": 0.75}                       # picture heights a segment
FLOOR = 0.70                                               # where wall and floor meet
FEET = {"Mia": 0.88, "Pip": 0.95}
TEST_SEEDS = 1_000_000                                     # seeds from here on are never trained on


@dataclass(frozen=True)
class Room:
    """What an episode hides about a room: names into the palettes, and the kind of furniture."""
    wall: str
    furniture: str
    colour: str


@dataclass(frozen=True)
class Scene:
    """A room, its cast, its segments (first ... first + segments - 1), and where everybody is in every drawing.

    `drawings` holds 12 segments + 1 dictionaries {who: (x, y, pose, facing right)}, the feet in picture heights.
    The one drawing beyond the last segment is why no latent of four frames ever sees two scenes.
    """
    room: str
    cast: tuple
    first: int
    segments: int
    drawings: tuple


@dataclass(frozen=True)
class Episode:
    """A storyboard of S segments and the ground truth behind it."""
    seed: int
    scenes: tuple[Scene, ...]
    segments: tuple[Segment, ...]
    colours: dict                # character -> name in CHARACTER_COLOURS
    rooms: dict                  # room -> Room

    def at(self, frame):
        """The scene of frame 0 ... 48 S of the joined video, and {who: (x, y, pose, facing right)} in it."""
        drawing = -(-frame // FOURS)
        scene = next(scene for scene in self.scenes if drawing <= DRAWINGS * (scene.first + scene.segments))
        return scene, scene.drawings[drawing - DRAWINGS * scene.first]


def pick(rng, options):
    options = list(options)
    return options[rng.integers(len(options))]


def plan_rooms(rng, segments):
    """[(room, segments)] of scenes of 1 to 3 segments. Rooms recur: mostly A B A, sometimes from farther back.

    From three segments on, every episode comes back to its first room after another.
    """
    scenes, first = [], 0
    while first < segments:
        rooms = [room for room, _ in scenes]
        returns = len(rooms) == 2 or len(rooms) > 2 and rng.random() < 0.7
        room = rooms[-2] if returns else pick(rng, [room for room in ROOMS if room not in rooms[-2:]])
        needed = max(2 - len(rooms), 0) if segments >= 3 else 0             # segments kept for the return
        length = min(rng.choice([1, 2, 3], p=[0.76, 0.16, 0.08]), segments - first - needed)
        scenes.append((room, int(length)))
        first += length
    return scenes


VERBS = {"stand": ("stands still", "waits quietly", "rests"), "wave": ("waves a paw", "waves hello"),
         "jump": ("jumps up and down", "hops happily"), "walk": ("walks", "strolls", "wanders"),
         "run": ("runs", "dashes", "races")}
AT = {"left": ("on the left", "at the left side"), "middle": ("in the middle", "in the centre"),
      "right": ("on the right", "at the right side")}
FILLERS = ("Nobody else is here.", "The camera does not move.", "Everything else is quiet.", "It is a calm day.")


@dataclass(frozen=True)
class Action:
    """What one character does in a segment, and between which places, in words and in picture heights."""
    verb: str
    start: str
    end: str

    def clause(self, rng, who):
        name = pick(rng, (who, f"{who} the {CHARACTERS[who]}"))
        verb = pick(rng, VERBS[self.verb])
        if self.start != self.end:
            return f"{name} {verb} from the {self.start} to the {self.end}"
        return f"{name} {verb} {pick(rng, AT[self.end])}"

    def at(self, t, y):
        """(x, y, pose, facing right) in drawing t of 0 ... 12, for feet that stand at y."""
        start, end = PLACES[self.start], PLACES[self.end]
        right = end > start if end != start else self.end == "left"
        if self.start != self.end:
            steps = round(DRAWINGS * abs(end - start) / SPEED[self.verb])
            return start + (end - start) * min(t / steps, 1), y, f"walk{t % 4}" if t < steps else "stand", right
        if self.verb == "jump":
            lift = 0.14 * abs(np.sin(np.pi * t / 6))
            return end, y - lift, "air" if lift > 0.01 else "stand", right
        return end, y, f"wave{t % 4}" if self.verb == "wave" else "stand", right


def plan_action(rng, place):
    """A random action from `place`: one place is walked, one or two are run."""
    verb = pick(rng, ("stand", "wave", "wave", "jump", "jump", "walk", "walk", "walk", "run", "run"))
    reach = {"walk": 0.5, "run": 1.0}.get(verb, 0.0)
    ends = [end for end in PLACES if 0 < abs(PLACES[end] - PLACES[place]) < reach]
    return Action(verb, place, pick(rng, ends or [place]))


def plan_segment(rng, places):
    """{who: Action} for characters that are at {who: place}; at the end of a segment everyone has a place alone."""
    while True:
        plan = {who: plan_action(rng, place) for who, place in places.items()}
        if len({action.end for action in plan.values()}) == len(plan):
            return plan


def paragraph(rng, room, plan):
    """The text of one segment without its marks, 15 to 34 words."""
    clauses = [action.clause(rng, who) for who, action in sorted(plan.items(), key=lambda _: rng.random())]
    deed = pick(rng, (" while ", " and ", "; meanwhile ")).join(clauses)
    where = pick(rng, (room, f"{room} {ROOMS[room]}", f"{room} {ROOMS[room]}"))
    if len(clauses) == 1 or len(deed.split()) < 14:
        where = f"{room} {ROOMS[room]}"
    text = pick(rng, (f"In the {where}, {deed}.", f"Here is the {where}: {deed}.", f"We see the {where}, and {deed}."))
    text = text if len(text.split()) <= 34 else f"In the {room}, {deed}."
    while len(text.split()) < 15:
        text += " " + pick(rng, [filler for filler in FILLERS if filler not in text])
    return text


def plan_scene(rng, room, first, segments):
    """A scene and its paragraphs: a cast, a place for everyone, and an action for everyone in every segment."""
    cast = pick(rng, (("Mia",), ("Pip",), ("Mia", "Pip"), ("Mia", "Pip")))
    places = dict(zip(cast, rng.permutation(list(PLACES)).tolist()))
    drawings, texts = [{}] * (DRAWINGS * segments + 1), []
    for i in range(segments):
        plan = plan_segment(rng, places)
        places = {who: action.end for who, action in plan.items()}
        texts.append(paragraph(rng, room, plan))
        for t in range(DRAWINGS + 1):
            drawings[DRAWINGS * i + t] = {who: action.at(t, FEET[who]) for who, action in plan.items()}
    return Scene(room, cast, first, segments, tuple(drawings)), texts


def episode(seed, segments):
    """The episode of a seed: `segments` segments of 3 seconds. The same seed gives the same episode everywhere."""
    rng = np.random.default_rng([2504, seed])
    colours = dict(zip(CHARACTERS, rng.permutation(list(CHARACTER_COLOURS)).tolist()))
    rooms = {room: Room(pick(rng, WALL_COLOURS), pick(rng, FURNITURE), pick(rng, FURNITURE_COLOURS)) for room in ROOMS}
    scenes, story, first = [], [], 0
    for room, length in plan_rooms(rng, segments):
        scene, texts = plan_scene(rng, room, first, length)
        story += [Segment(text, None, len(scenes)) for text in mark_scene(texts)]
        scenes.append(scene)
        first += length
    return Episode(seed, tuple(scenes), tuple(story), colours, rooms)


def storyboard_text(episode):
    """The episode's storyboard in Format 3: a paragraph a segment, ready to be edited."""
    return "\n\n".join(segment.text for segment in episode.segments) + "\n"


class Canvas:
    """A picture of flat shapes with smooth edges. Shapes are signed distances (negative inside) in picture heights."""

    def __init__(self, height, width, left=0.0, top=0.0):
        self.x = left + (np.arange(width, dtype=np.float32) + 0.5)[None, :] / HEIGHT
        self.y = top + (np.arange(height, dtype=np.float32) + 0.5)[:, None] / HEIGHT
        self.rgba = np.zeros((height, width, 4), np.float32)                 # premultiplied, 0 ... 255

    def ellipse(self, x, y, rx, ry):
        return (np.hypot((self.x - x) / rx, (self.y - y) / ry) - 1) * min(rx, ry)

    def box(self, left, top, right, bottom, corner=0.0):
        dx = np.abs(self.x - (left + right) / 2) - (right - left) / 2 + corner
        dy = np.abs(self.y - (top + bottom) / 2) - (bottom - top) / 2 + corner
        return np.hypot(dx.clip(0), dy.clip(0)) + np.maximum(dx, dy).clip(max=0) - corner

    def line(self, x0, y0, x1, y1, thick):
        dx, dy = x1 - x0, y1 - y0
        along = (((self.x - x0) * dx + (self.y - y0) * dy) / (dx * dx + dy * dy)).clip(0, 1)
        return np.hypot(self.x - x0 - along * dx, self.y - y0 - along * dy) - thick / 2

    def polygon(self, *points):
        """Convex, corners in clockwise order."""
        edges = zip(points, points[1:] + points[:1])
        return np.maximum.reduce([((y1 - y0) * (self.x - x0) - (x1 - x0) * (self.y - y0)) / np.hypot(x1 - x0, y1 - y0)
                                  for (x0, y0), (x1, y1) in edges])

    def paint(self, *shapes, outline=0.0):
        """Paints (distance, colour) pairs in order, first all of them a little larger in ink if there is an outline."""
        inked = [(distance - outline, INK) for distance, _ in shapes] if outline else []
        for distance, colour in [*inked, *shapes]:
            near = distance < 0.5 / HEIGHT
            cover = (0.5 - distance[near] * HEIGHT).clip(max=1)[:, None]
            self.rgba[near] += cover * (np.array([*colour, 255], np.float32) - self.rgba[near])


INK, WHITE, WOOD, LEAF, PINK = (40, 34, 46), (250, 250, 250), (146, 104, 66), (96, 160, 84), (250, 170, 180)
GLASS, NIGHT = (150, 210, 250), (40, 48, 96)
BOOKS = (196, 84, 74), (90, 140, 180), (226, 190, 110), (110, 160, 110)
OUTLINE = 0.011
FEET_AT = 76.8, 32                                         # row and column of a sprite


def mix(colour, other, amount):
    return tuple(a + (b - a) * amount for a, b in zip(colour, other))


def draw_room(canvas, name):
    """What never changes about a room, so that its name in the text is enough to draw it."""
    c = canvas
    if name == "kitchen":
        c.paint((c.box(0.86, 0.10, 1.34, 0.46, 0.02), WHITE), outline=OUTLINE)
        c.paint((c.box(0.90, 0.14, 1.085, 0.42), GLASS), (c.box(1.115, 0.14, 1.30, 0.42), GLASS))
        c.paint((c.box(-0.1, 0.48, 0.62, 0.74), (214, 214, 220)), (c.box(-0.1, 0.44, 0.66, 0.50), (120, 110, 116)),
                outline=OUTLINE)
        c.paint((c.line(0.30, 0.53, 0.30, 0.72, 0.012), INK), (c.ellipse(0.25, 0.61, 0.016, 0.016), INK),
                (c.ellipse(0.35, 0.61, 0.016, 0.016), INK))
    if name == "bedroom":
        c.paint((c.box(0.14, 0.10, 0.56, 0.46, 0.02), WHITE), outline=OUTLINE)
        c.paint((c.box(0.18, 0.14, 0.52, 0.42), NIGHT), (c.ellipse(0.36, 0.28, 0.09, 0.09), (255, 240, 170)),
                (c.ellipse(0.41, 0.25, 0.08, 0.08), NIGHT))
        c.paint((c.box(1.36, 0.36, 1.44, 0.76, 0.02), WOOD), (c.box(0.82, 0.58, 1.40, 0.72, 0.03), WHITE),
                (c.box(1.20, 0.53, 1.36, 0.62, 0.04), PINK), (c.box(0.80, 0.52, 0.86, 0.76, 0.02), WOOD), outline=OUTLINE)
    if name == "library":
        c.paint((c.box(0.42, 0.06, 1.08, 0.72, 0.01), WOOD), outline=OUTLINE)
        for row, top in enumerate((0.10, 0.30, 0.50)):
            c.paint((c.box(0.46, top, 1.04, top + 0.16), mix(WOOD, INK, 0.55)))
            for i, colour in enumerate(BOOKS):
                x = 0.48 + 0.14 * ((i + row) % 4)
                c.paint((c.box(x, top + 0.03, x + 0.11, top + 0.16), colour))
    if name == "garden":
        c.paint((c.ellipse(0.20, 0.17, 0.10, 0.10), (255, 236, 130)), (c.box(-0.1, 0.57, 1.6, 0.61), WHITE))
        c.paint(*[(c.box(0.05 + 0.19 * i, 0.50, 0.15 + 0.19 * i, 0.73, 0.03), WHITE) for i in range(8)])
        c.paint((c.box(1.16, 0.40, 1.26, 0.75), WOOD), (c.ellipse(1.21, 0.25, 0.24, 0.20), LEAF), outline=OUTLINE)


def draw_furniture(canvas, kind, x, colour):
    """The big piece of furniture that an episode puts into a room, centred at x."""
    c, dark = canvas, mix(colour, INK, 0.35)
    if kind == "armchair":
        shapes = [(c.box(x - 0.15, 0.44, x + 0.15, 0.74, 0.07), colour), (c.box(x - 0.14, 0.64, x + 0.14, 0.78, 0.02), dark),
                  *[(c.box(x + s - 0.045, 0.58, x + s + 0.045, 0.80, 0.04), colour) for s in (-0.165, 0.165)]]
    if kind == "table":
        shapes = [(c.box(x - 0.17, 0.60, x - 0.12, 0.82), dark), (c.box(x + 0.12, 0.60, x + 0.17, 0.82), dark),
                  (c.box(x - 0.23, 0.54, x + 0.23, 0.64, 0.03), colour)]
    if kind == "chest":
        shapes = [(c.box(x - 0.18, 0.60, x + 0.18, 0.81, 0.02), colour), (c.box(x - 0.19, 0.51, x + 0.19, 0.63, 0.05), dark),
                  (c.box(x - 0.03, 0.59, x + 0.03, 0.67, 0.01), (250, 214, 90))]
    if kind == "lamp":
        shade = (x - 0.09, 0.20), (x + 0.09, 0.20), (x + 0.17, 0.46), (x - 0.17, 0.46)
        shapes = [(c.box(x - 0.02, 0.45, x + 0.02, 0.80), dark), (c.box(x - 0.10, 0.77, x + 0.10, 0.81, 0.02), dark),
                  (c.polygon(*shade), colour)]
    canvas.paint(*shapes, outline=OUTLINE)


@lru_cache(maxsize=64)
def draw_background(name, room):
    """A room of an episode without its characters, uint8 [128, 192, 3]."""
    canvas, floor = Canvas(HEIGHT, WIDTH), FLOORS[name]
    canvas.paint((canvas.box(-1, -1, 3, 2), WALL_COLOURS[room.wall]), (canvas.box(-1, FLOOR, 3, 2), floor),
                 (canvas.box(-1, FLOOR - 0.012, 3, FLOOR + 0.008), mix(floor, INK, 0.4)))
    draw_room(canvas, name)
    draw_furniture(canvas, room.furniture, CORNERS[name], FURNITURE_COLOURS[room.colour])
    return canvas.rgba[..., :3].round().astype(np.uint8)


def eyes(c, x, y, side):
    for dx in (-0.04, 0.04):
        c.paint((c.ellipse(x + dx, y, 0.033, 0.040), WHITE),
                (c.ellipse(x + dx + 0.014 * side, y + 0.004, 0.016, 0.022), INK))


def limbs(c, pose, hip, hip_y, shoulder, shoulder_y, reach, thick):
    """Two legs and two arms: legs swing when walking, an arm is up when waving, all are spread in the air."""
    kind, phase = pose.rstrip("0123"), int(pose[-1]) if pose[-1].isdigit() else 0
    swing = {"walk": 0.06 * np.sin(np.pi * phase / 2), "air": 0.05}.get(kind, 0.0)
    hands = {side: (side * (shoulder + reach / 2), shoulder_y + reach) for side in (-1, 1)}
    if kind == "wave":
        hands[1] = (shoulder + 0.05 + (0.0, 0.04, 0.08, 0.04)[phase], shoulder_y - 1.2 * reach)
    if kind == "air":
        hands = {side: (side * (shoulder + reach), shoulder_y - reach / 2) for side in (-1, 1)}
    legs = [c.line(side * hip, hip_y, side * (hip + swing), -thick / 2, thick) for side in (-1, 1)]
    arms = [c.line(side * shoulder, shoulder_y, *hands[side], thick) for side in (-1, 1)]
    return [*legs, *arms]


def draw_cat(canvas, colour, pose, side):
    """Tall, pointed ears; the feet are at (0, 0), it looks to `side` (-1 left, 1 right)."""
    c, pale = canvas, mix(colour, WHITE, 0.65)
    ears = [c.polygon((s * 0.095 - 0.055, -0.42), (s * 0.125, -0.56), (s * 0.095 + 0.055, -0.42)) for s in (-1, 1)]
    tail = [c.line(-0.06 * side, -0.10, -0.17 * side, -0.16, 0.04), c.line(-0.17 * side, -0.16, -0.18 * side, -0.30, 0.04)]
    body, head = c.ellipse(0, -0.18, 0.095, 0.13), c.ellipse(0.015 * side, -0.37, 0.135, 0.105)
    shapes = [*tail, *limbs(c, pose, 0.05, -0.10, 0.07, -0.26, 0.09, 0.055), *ears, body, head]
    c.paint(*[(shape, colour) for shape in shapes], outline=OUTLINE)
    c.paint((c.ellipse(0, -0.16, 0.055, 0.085), pale), (c.ellipse(0.03 * side, -0.325, 0.06, 0.038), pale))
    eyes(c, 0.03 * side, -0.39, side)
    c.paint((c.ellipse(0.035 * side, -0.335, 0.016, 0.012), INK))


def draw_mouse(canvas, colour, pose, side):
    """Small, big round ears."""
    c, pale = canvas, mix(colour, WHITE, 0.65)
    ears = [c.ellipse(s * 0.125, -0.29, 0.088, 0.088) for s in (-1, 1)]
    tail = c.line(-0.08 * side, -0.06, -0.21 * side, -0.09, 0.022)
    body, head = c.ellipse(0, -0.11, 0.10, 0.09), c.ellipse(0.01 * side, -0.20, 0.12, 0.105)
    shapes = [tail, *limbs(c, pose, 0.05, -0.07, 0.08, -0.12, 0.06, 0.045), *ears, body, head]
    c.paint(*[(shape, colour) for shape in shapes], outline=OUTLINE)
    c.paint(*[(c.ellipse(s * 0.13, -0.295, 0.05, 0.05), PINK) for s in (-1, 1)], (c.ellipse(0, -0.085, 0.06, 0.055), pale))
    eyes(c, 0.03 * side, -0.215, side)
    c.paint((c.ellipse(0.075 * side, -0.15, 0.022, 0.018), INK))


@lru_cache(maxsize=1024)
def sprite(who, colour, pose, right):
    """A character in a pose: colours premultiplied by alpha [79, 64, 3] and 1 - alpha; its feet are at FEET_AT."""
    canvas = Canvas(79, 64, left=-FEET_AT[1] / HEIGHT, top=-FEET_AT[0] / HEIGHT)
    draw = {"cat": draw_cat, "mouse": draw_mouse}[CHARACTERS[who]]
    draw(canvas, CHARACTER_COLOURS[colour], pose, 1 if right else -1)
    return canvas.rgba[..., :3], 1 - canvas.rgba[..., 3:] / 255


def paste(picture, drawing, colours):
    """Draws everybody into a picture uint8 [128, 192, 3], in place, as far as they are in it: {who: (x, y, pose, facing right)} in
    {who: colour}."""
    for who in sorted(drawing):                                               # Pip is smaller and in front
        x, y, pose, right = drawing[who]
        paint, clear = sprite(who, colours[who], pose, right)
        top, left = round(y * HEIGHT - FEET_AT[0]), round(x * HEIGHT - FEET_AT[1])
        under = picture[max(top, 0):top + len(paint), max(left, 0):left + len(paint[0])]
        paint, clear = (x[max(-top, 0):, max(-left, 0):][:under.shape[0], :under.shape[1]] for x in (paint, clear))
        under[:] = under * clear + paint + 0.5


def render_scene(episode, scene, shrink=1):
    """One scene as it is shot, uint8 [48 segments + 1, 128, 192, 3]: one frame of its first drawing, four of each other."""
    background = draw_background(scene.room, episode.rooms[scene.room])
    pictures = repeat(background, "h w c -> t h w c", t=len(scene.drawings)).copy()
    for picture, drawing in zip(pictures, scene.drawings):
        paste(picture, drawing, episode.colours)
    if shrink > 1:
        pictures = reduce(pictures + 0.5, "t (h a) (w b) c -> t h w c", "mean", a=shrink, b=shrink).astype(np.uint8)
    return repeat(pictures, "t h w c -> (t fours) h w c", fours=FOURS)[FOURS - 1:]


def render(episode, height=HEIGHT, width=WIDTH):
    """The joined video, uint8 [48 S + 1, height, width, 3]. Frame 48 i is segment i - 1's last: cuts show at 48 i + 1.

    Smaller pictures, of a half or a quarter of the size, are averages over squares of pixels.
    """
    if (HEIGHT % height, width * HEIGHT) != (0, height * WIDTH):
        raise ValueError(f"{height} x {width} is not a whole fraction of {HEIGHT} x {WIDTH}")
    clips = [render_scene(episode, scene, HEIGHT // height) for scene in episode.scenes]
    return np.concatenate([clips[0], *[clip[1:] for clip in clips[1:]]])


def write_video(path, frames, fps=FPS):
    """Writes uint8 frames [n, height, width, 3] as h264 that any player opens."""
    import imageio
    with imageio.get_writer(path, fps=fps, codec="libx264", quality=None, macro_block_size=2, ffmpeg_log_level="error",
                            output_params=["-crf", "17", "-preset", "veryfast", "-threads", "1"]) as writer:
        for frame in frames:
            writer.append_data(frame)


def write_episode(out, seed, segments):
    """Writes one episode as NAME.mp4 and NAME.json, unless a complete one is there; the JSON comes last."""
    video, board = out / f"episode-{seed:07d}.mp4", out / f"episode-{seed:07d}.json"
    world = episode(seed, segments)
    bare = [segment.text.removeprefix(START).removesuffix(END) for segment in world.segments]
    scenes, start = [], 0.0
    for scene in world.scenes:
        end = start + (SEGMENT * scene.segments + 1) / FPS
        scenes.append({"start": start, "end": end, "place": scene.room, "segments": bare[scene.first:scene.first + scene.segments]})
        start = end
    text = json.dumps(scenes, indent=1) + "\n"
    if video.exists() and board.exists() and board.read_text() == text:
        return
    with atomic(video) as partial:
        write_video(partial, chain.from_iterable(render_scene(world, scene) for scene in world.scenes))
    with atomic(board) as partial:
        partial.write_text(text)


def render_world(out, episodes, segments=21, seed=0):
    """Writes the episodes of seeds seed ... seed + episodes - 1 into the folder `out`; finished ones are kept."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)

    def work(number, advance):
        write_episode(out, number, segments)
        advance()

    in_parallel(work, range(seed, seed + episodes), "render", "episode")


# 4. The codec -----------------------------------------------------------------------------------------------

CODEC_SIZE = 64, 96                                        # of the pictures, or parts of pictures, that a codec learned from


def codec_file(height):
    """Weights for pictures of this height: twice as large, walls and furniture have finer edges, and a codec of their own."""
    return Path(__file__).parent / "assets" / f"pocket_codec{'_128' if height >= 128 else ''}.safetensors"


class Residual(nn.Module):
    """x + conv(silu(conv(norm(x)))), where the norm makes every pixel's channels a vector of length sqrt(width)."""

    def __init__(self, width, inner):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width, 1, 1))
        self.to_inner = nn.Conv2d(width, inner, 3, padding=1)
        self.to_width = nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x):
        norm = x.square().mean(1, keepdim=True).add(1e-4).rsqrt()
        return x + self.to_width(F.silu(self.to_inner(x * norm * self.gain)))


def up(width, out):
    return nn.Sequential(nn.Conv2d(width, 4 * out, 1), nn.PixelShuffle(2))


def down(width, out):
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * width, out, 1))


def as_input(groups):
    return (groups.float() / 255 - 0.5).contiguous(memory_format=torch.channels_last)


def as_frames(groups):
    pixels = ((groups + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)
    return rearrange(pixels, "k (t c) h w -> (k t) h w c", c=3)


def codec_networks(channels):
    """The two halves of the pocket world's codec, untrained."""
    encoder = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(192, 96, 1), Residual(96, 48), down(96, 112),
                            Residual(112, 48), nn.Conv2d(112, channels, 1))
    decoder = nn.Sequential(nn.Conv2d(channels, 112, 3, padding=1), Residual(112, 56), up(112, 64),
                            Residual(64, 48), up(64, 32), Residual(32, 32), up(32, 12))
    return nn.ModuleDict(dict(encoder=encoder, decoder=decoder))


class PocketCodec:
    """Small video autoencoder: 8 x 8 in space, 4 in time with the first frame alone, 16 channels, as CogVideoX's VAE.

    Every group of four frames is coded by itself, as a 12-channel picture; the first frame stands for four of itself.
    It has seen nothing but the pocket world: other videos come out soft. `scale` is the one constant that brings
    latents to standard deviation 1, `id` a short hash of the weights. UserError when the weights are missing.
    """
    channels, down_space, down_time, threads = 16, 8, 4, 2

    def __init__(self, height=64, width=96, path=None):
        self.height, self.width, networks = height, width, codec_networks(self.channels)
        path = Path(path or codec_file(height))
        if not path.exists():
            raise UserError(f"{path}: the codec's weights are missing, make them with python dataset.py --train_codec, "
                            "for pictures of 128 lines and more with --height 128")
        with safe_open(path, "pt") as file:
            self.scale = float(file.metadata()["scale"])
            networks.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})
        self.id = short_hash(path.read_bytes())
        self.encoder, self.decoder = networks["encoder"], networks["decoder"]

    @torch.no_grad()
    def encode(self, frames, batch=16):
        """uint8 frames [4 k + 1, height, width, 3], numpy or torch -> float32 latents [k + 1, 16, height / 8, width / 8]."""
        frames = torch.as_tensor(frames)
        if frames.ndim != 4 or frames.shape[1:] != (self.height, self.width, 3) or len(frames) % self.down_time != 1:
            raise ValueError(f"frames must be [4 k + 1, {self.height}, {self.width}, 3], not {list(frames.shape)}")
        groups = torch.cat([frames[:1].expand(self.down_time, -1, -1, -1), frames[1:]])
        groups = rearrange(groups, "(k t) h w c -> k (t c) h w", t=self.down_time)
        parts = [self.encoder(as_input(part)) for part in groups.split(batch)]
        return torch.cat(parts).contiguous() * self.scale

    @torch.no_grad()
    def decode(self, latents, batch=16):
        """Latents [T, 16, h, w] -> uint8 frames [4 (T - 1) + 1, 8 h, 8 w, 3] as numpy."""
        parts = [as_frames(self.decoder(part / self.scale)) for part in latents.float().split(batch)]
        return torch.cat(parts)[self.down_time - 1:].numpy()


def codec_groups(seed, episodes, height, width):
    """Groups of four frames [n, 4, height, width, 3] from 6-segment episodes, read from video files as in section 7."""
    groups = []
    with tempfile.TemporaryDirectory() as folder:
        render_world(folder, episodes, segments=6, seed=seed)
        for video in sorted(Path(folder).glob("*.mp4")):
            cuts, last = read_cuts(video.with_suffix(".json"))
            frames = read_frames(video, height, width)
            groups += [rearrange(segment[1:], "(k t) h w c -> k t h w c", t=PocketCodec.down_time)
                       for segment in cut_segments(frames, cuts, last, video.name)]
    return np.concatenate(groups)


def psnr(a, b):
    """Peak signal-to-noise ratio of uint8 pictures, in dB."""
    return -10 * float(np.log10(np.mean((np.float32(a) - np.float32(b)) ** 2) / 255 ** 2))


def train_codec(height=64, steps=9000, batch=8, noise=0.12, lr=0.01):
    """Makes the weights for pictures of this height: reconstruction from latents with noise on them, so that decoding forgives a
    model's errors. Of larger pictures than CODEC_SIZE it sees parts.

    Matrices by Muon, which needs a third of AdamW's steps here. About 15 minutes on one core.
    """
    torch.manual_seed(0)
    rng, corners, width = np.random.default_rng(0), np.random.default_rng(1), 3 * height // 2
    groups = codec_groups(500_000, 128 * CODEC_SIZE[0] // height, height, width)
    codec = codec_networks(PocketCodec.channels)
    kernels = [weight for weight in codec.parameters() if weight.ndim == 4]
    matrices = [nn.Parameter(kernel.detach().flatten(1)) for kernel in kernels]              # the same numbers, as matrices
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.02)
    adam = torch.optim.AdamW([weight for weight in codec.parameters() if weight.ndim != 4], lr=0.3 * lr)
    for step in tqdm(range(steps), desc="codec", unit="step"):
        decay = min(1, (step + 1) / 50) * (0.01 + 0.99 * (1 + np.cos(np.pi * step / steps)) / 2)
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = lr * decay, 0.3 * lr * decay
        top, left = (corners.integers(length - part + 1) for length, part in zip((height, width), CODEC_SIZE))
        x = groups[rng.integers(len(groups), size=batch), :, top:top + CODEC_SIZE[0], left:left + CODEC_SIZE[1]]
        x = as_input(rearrange(torch.from_numpy(x), "b t h w c -> b (t c) h w"))
        with torch.autocast("cpu", torch.bfloat16):
            z = codec["encoder"](x).float()
            y = codec["decoder"](z + noise * torch.randn_like(z)).float()
        loss = 10 * F.mse_loss(y, x) + F.l1_loss(y, x) + 0.1 * (z.square().mean() - 1) ** 2
        codec.zero_grad()
        loss.backward()
        for kernel, matrix in zip(kernels, matrices):
            matrix.grad = kernel.grad.flatten(1)
        muon.step()
        adam.step()
    save_codec(codec, codec_groups(TEST_SEEDS, 16 * CODEC_SIZE[0] // height, height, width), codec_file(height))


def save_codec(codec, held_out, out):
    """Writes float16 weights and the one constant that brings latents to standard deviation 1; prints what they reach."""
    with torch.no_grad():
        z = torch.cat([codec["encoder"](as_input(part)) for part in rearrange(torch.from_numpy(held_out), "b t h w c -> b (t c) h w").split(64)])
    with atomic(out) as partial:
        weights = {name: weight.half().contiguous() for name, weight in codec.state_dict().items()}
        save_file(weights, partial, {"scale": f"{1 / z.std().item():.4f}"})
    codec = PocketCodec(*held_out.shape[2:4], path=out)
    frames = rearrange(held_out, "k t h w c -> (k t) h w c")[codec.down_time - 1:]
    latents = codec.encode(frames)
    noisy = latents + 0.1 * torch.randn_like(latents)
    print(f"held-out PSNR {psnr(codec.decode(latents), frames):.1f} dB, with 10 % noise on the latents "
          f"{psnr(codec.decode(noisy), frames):.1f} dB, {out.stat().st_size / 1e6:.2f} MB, codec {codec.id}")


# 5. The text encoder ----------------------------------------------------------------------------------------


@lru_cache(maxsize=100_000)
def word_vector(word, dim):
    """A fixed Gaussian vector for any word, the same on every machine."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(dim).astype(np.float32)


def sinusoids(length, dim):
    """The positions of Attention Is All You Need, float32 [length, dim]."""
    angle = np.arange(length)[:, None] * 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


class PocketText:
    """The text encoder in place of T5. Unknown words are fine.

    Half of a token's channels are its word's fixed vector, the other half a fading memory of the words before it, so
    that "left" knows who is on the left; then its position.
    """
    fade = 0.8

    def __init__(self, length=40, dim=64):
        self.length, self.dim = length, dim
        self.id = f"pocket-words-2-{length}x{dim}"
        self.positions = 0.5 * sinusoids(length, dim)

    def words(self, text):
        return re.findall(rf"{START}|{END}|[^\W_]+(?:['’][^\W_]+)*", text.lower())

    def encode(self, texts, where="storyboard"):
        """Paragraphs, one a segment -> float32 [S, N, dim], zeros after the last word; a longer one is cut, and named."""
        out = np.zeros((len(texts), self.length, self.dim), np.float32)
        for number, text in enumerate(texts, 1):
            words = cut_words(self.words(text), self.length, 1, f"{where}, segment {number}")
            memory = np.zeros(self.dim // 2, np.float32)
            for n, word in enumerate(words):
                vector = word_vector(word, self.dim // 2)
                out[number - 1, n] = np.concatenate([vector, memory]) + self.positions[n]
                memory = self.fade * memory + np.sqrt(1 - self.fade ** 2) * vector
        return torch.from_numpy(out)


# 6. CogVideoX's own codec and text encoder (4.1) -----------------------------------------------------------------


def from_pretrained(library, name, folder, what, **settings):
    """What the class `name` of diffusers or transformers reads from a folder, or a UserError."""
    try:
        return getattr(importlib.import_module(library), name).from_pretrained(folder, local_files_only=True, **settings)
    except ImportError as error:
        raise UserError(f"{what} needs packages that are not installed ({first_line(error)}): {INSTALL}") from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: {library} cannot read {what} here ({first_line(error)}); {INSTALL}") from None


def load_pretrained(library, name, folder, part, **settings):
    """The class `name` of diffusers or transformers from a folder of CogVideoX's pipeline, or from its subfolder `part`.

    Only safetensors are read, and nothing in them is executed. Raises UserError: library or folder missing, weights that
    do not fill the network.
    """
    folder = Path(folder) / part if (Path(folder) / part).is_dir() else Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; download CogVideoX's {part} and name its folder")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no .safetensors here, the {part} of CogVideoX is wanted; other formats may run code, they are not read")
    model, found = from_pretrained(library, name, folder, f"the {part}", use_safetensors=True, output_loading_info=True, **settings)
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{folder}: not the {part} of CogVideoX, tensor {missing[0]} is missing ({len(missing)} such in all)")
    return model.eval().requires_grad_(False), folder


INSTALL = "pip install diffusers transformers sentencepiece protobuf"


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def weights_id(folder):
    """A short hash of the weights in a folder: length, beginning, middle and end of every file."""
    digest, part = hashlib.sha256(), 1 << 20
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - part)):
                file.seek(start)
                digest.update(file.read(part))
    return digest.hexdigest()[:12]


@contextmanager
def on_device(model, device):
    """Has the model on the device inside the block only: its memory is free for the DiT before and after."""
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")


class CogVideoXCodec:
    """CogVideoX's VAE: 8 x 8 in space, 4 in time with the first frame alone, as diffusers has it.

    `scale` multiplies its latents: the VAE's own scaling_factor (0.7 at 5B) unless given; the paper trains with 1.0. Frames are
    `height` x `width`, the VAE's own sample size unless given. In bf16 on a GPU.
    """
    down_time, threads = 4, 1

    def __init__(self, folder, height=None, width=None, scale=None, device="cpu"):
        self.device = torch.device(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.vae, folder = load_pretrained("diffusers", "AutoencoderKLCogVideoX", folder, "vae", torch_dtype=dtype)
        self.dtype, config = dtype, self.vae.config
        self.height, self.width = height or config.sample_height, width or config.sample_width
        self.channels, self.down_space = config.latent_channels, 2 ** (len(config.block_out_channels) - 1)
        self.scale = float(config.scaling_factor if scale is None else scale)
        self.id = f"cogvideox-vae-{weights_id(folder)}-scale-{self.scale:g}"
        print(f"VAE {folder}: latents times {self.scale:g} ({'its own scaling_factor' if scale is None else '--vae_scale'})")

    @torch.no_grad()
    def encode(self, frames):
        """uint8 frames [4 k + 1, height, width, 3], numpy or torch -> float32 latents [k + 1, C, h, w], the VAE's mean."""
        pixels = rearrange(torch.as_tensor(frames), "t h w c -> 1 c t h w").to(self.device, self.dtype) / 127.5 - 1
        with on_device(self.vae, self.device):
            latents = self.vae.encode(pixels).latent_dist.mode()
        return rearrange(latents, "1 C t h w -> t C h w").float().cpu() * self.scale

    @torch.no_grad()
    def decode(self, latents):
        """Latents [T, C, h, w] -> uint8 frames [4 (T - 1) + 1, height, width, 3] as numpy; the VAE takes two latents at a time."""
        latents = rearrange(latents / self.scale, "t C h w -> 1 C t h w").to(self.device, self.dtype)
        with on_device(self.vae, self.device):
            pixels = self.vae.decode(latents).sample[0]
        return torch.stack([rearrange(frame.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8), "c h w -> h w c").cpu()
                            for frame in pixels.unbind(1)]).numpy()


class T5Words:
    """T5's tokenizer with the two scene marks, from the folder of CogVideoX, of T5's weights, or its own."""

    def __init__(self, folder):
        folder = Path(folder)
        places = folder / "tokenizer", folder.parent / "tokenizer", folder
        folder = next(path for path in places if path.is_dir() or path == folder)
        if not any((folder / name).exists() for name in ("spiece.model", "tokenizer.json")):     # transformers would make an empty one
            raise UserError(f"{folder}: T5's tokenizer is not here; its folder holds spiece.model or tokenizer.json")
        self.tokenizer = from_pretrained("transformers", "AutoTokenizer", folder, "T5's tokenizer", trust_remote_code=False)
        self.tokenizer.add_tokens([START, END], special_tokens=True)

    def words(self, text):
        """The tokens of a paragraph as ids, the end of the text among them."""
        return self.tokenizer(text)["input_ids"]


class T5Text(T5Words):
    """CogVideoX's text encoder, T5, as transformers has it: one paragraph a segment, padded to `length` tokens.

    The scene marks are two new tokens, `marks` [2, dim] their embeddings: normal numbers from a fixed seed, as large as T5's own.
    As in CogVideoX padding is attended.
    """

    def __init__(self, folder, length=226, device="cpu"):
        super().__init__(folder)
        self.model, part = load_pretrained("transformers", "T5EncoderModel", folder, "text_encoder", dtype="auto")
        self.length, self.dim, self.device = length, self.model.config.d_model, device
        words = self.model.get_input_embeddings().weight
        ids = self.tokenizer.convert_tokens_to_ids([START, END])
        if max(ids) >= len(words):
            self.model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        self.marks = torch.randn(2, self.dim, generator=torch.Generator().manual_seed(0)) * words.float().std()
        self.model.get_input_embeddings().weight.data[ids] = self.marks.to(words.dtype)
        self.id = f"t5-{weights_id(part)}-{length}x{self.dim}"

    @torch.no_grad()
    def encode(self, texts, where="storyboard"):
        """Paragraphs, one a segment -> float32 [S, N, dim]; a longer one is cut, and named."""
        out = []
        with on_device(self.model, self.device):
            for number, text in enumerate(texts, 1):
                ids = cut_words(self.words(text), self.length, 1 + text.endswith(END), f"{where}, segment {number}")
                ids += [self.tokenizer.pad_token_id] * (self.length - len(ids))
                out.append(self.model(torch.tensor([ids], device=self.device))[0].float().cpu())
        return torch.cat(out)


def cut_words(words, length, ending, where):
    """At most `length` words: what is too many goes before the last `ending` ones, with a warning."""
    if len(words) <= length:
        return words
    tqdm.write(f"warning: {where}: {len(words)} words, cut to {length}", file=sys.stderr)
    return words[:length - ending] + words[-ending:]


def open_encoders(vae=None, text_encoder=None, vae_scale=None, size=(None, None), text=(None, None), device="cpu"):
    """(codec, text encoder): CogVideoX's from the folders that are given, else the pocket world's.

    size    height and width of frames, text  tokens of a segment and their width; None stands for the encoder's own
    """
    for length, name in zip(size, ("height", "width")):
        if (length or 16) % 16 or (length or 16) < 16:
            raise UserError(f"--{name} {length}: must be a multiple of 16, since the codec takes 8 x 8 pixels and the DiT 2 x 2 latents")
    height, width = size
    codec = CogVideoXCodec(vae, height, width, vae_scale, device) if vae else PocketCodec(height or 64, width or 96)
    length, dim = text
    return codec, T5Text(text_encoder, length or 226, device) if text_encoder else PocketText(length or 40, dim or 64)


def add_encoder_flags(parser):
    parser.add_argument("--vae", metavar="FOLDER", help="CogVideoX's VAE, or its whole folder, in place of the pocket world's codec")
    parser.add_argument("--vae_scale", type=float, metavar="X", help="latents are multiplied by this (default: the VAE's own; the paper's is 1)")
    parser.add_argument("--text_encoder", metavar="FOLDER", help="CogVideoX's T5, or its whole folder, in place of the pocket world's words")


# 7. Real videos: scenes, segments, latents (3.3) ------------------------------------------------------------

FORMAT = "ttt-minute latents 1"
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".gif"}
SLACK = 2                                   # frames a scene may end beyond the video's last: rounding of its duration


@dataclass(frozen=True)
class Cut:
    """A scene of a user's video after trimming: frames begin ... begin + 48 * len(paragraphs) - 1 at 16 fps."""
    begin: int
    paragraphs: tuple
    place: str | None


def read_cuts(board):
    """Reads NAME.json: (cuts, the frame at which the last scene ends). Scenes too short for a segment are named."""
    scenes, cuts, before = read_json(read_text(board), board.name), [], 0.0
    if not isinstance(scenes, list) or not scenes:
        raise UserError(f"{board.name}: must be a list of scenes, each with start, end and segments")
    for number, scene in enumerate(scenes, 1):
        where = f"{board.name}, scene {number}"
        start, end, paragraphs, place = check_scene(scene, where)
        if start < before:
            raise UserError(f"{where}: starts at {start:g} s, before the scene ahead of it has ended ({before:g} s)")
        before = end
        begin, frames = round(start * FPS), round(end * FPS) - round(start * FPS)
        count = frames // SEGMENT
        if count == 0:
            tqdm.write(f"{where}: dropped, {end - start:g} s is shorter than a segment of {SECONDS} s")
        elif count != len(paragraphs):
            raise UserError(f"{where}: {end - start:g} s make {count} segments of {SECONDS} s, but there are "
                            f"{len(paragraphs)} paragraphs, one a segment is needed")
        else:
            cuts.append(Cut(begin + (frames - SEGMENT * count) // 2, tuple(paragraphs), place))   # equal trim at both ends
    if not cuts:
        raise UserError(f"{board.name}: nothing is left, every scene is shorter than {SECONDS} s")
    return cuts, round(before * FPS)


def check_scene(scene, where):
    """(start, end, paragraphs, place or None) of a scene object, types checked, scene marks taken off the paragraphs."""
    if not isinstance(scene, dict) or not {"start", "end", "segments"} <= scene.keys():
        raise UserError(f"{where}: needs start and end (seconds) and segments (a list of paragraphs)")
    start, end, segments = scene["start"], scene["end"], scene["segments"]
    numbers = all(type(value) in (int, float) and np.isfinite(value) for value in (start, end))
    if not numbers or not 0 <= start < end:
        raise UserError(f"{where}: start {start!r} and end {end!r} must be seconds with 0 <= start < end")
    if not isinstance(segments, list):
        raise UserError(f"{where}: segments must be a list of paragraphs")
    if not isinstance(scene.get("place", ""), str):
        raise UserError(f"{where}: place must be text")
    paragraphs = []
    for number, text in enumerate(segments, 1):
        text = text.get("text") if isinstance(text, dict) else text
        if not isinstance(text, str) or not text.replace(START, "").replace(END, "").strip():
            raise UserError(f"{where}, paragraph {number}: must be text that is not empty")
        check_marks(text, f"{where}, paragraph {number}")
        paragraphs.append(" ".join(text.replace(START, " ").replace(END, " ").split()))
    return start, end, paragraphs, scene.get("place")


def read_frames(video, height, width):
    """Yields uint8 [height, width, 3] at 16 fps: scaled to cover the size, then cropped around the centre."""
    import imageio_ffmpeg
    exact = "area+accurate_rnd+full_chroma_int+full_chroma_inp"       # ffmpeg's default halves the colours' resolution
    filters = f"fps={FPS},scale={width}:{height}:force_original_aspect_ratio=increase:flags={exact},crop={width}:{height}"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-i", str(video), "-map", "0:v:0",
               "-vf", filters, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    size, count = height * width * 3, 0
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, bufsize=16 * size)
        try:
            while len(data := process.stdout.read(size)) == size:
                count += 1
                yield rearrange(np.frombuffer(data, np.uint8), "(h w c) -> h w c", h=height, w=width)
        finally:
            process.kill()
            process.wait()
        complaints.seek(0)
        reason = complaints.read().decode(errors="replace").strip().splitlines()
    if count == 0:
        raise UserError(f"{video.name}: does not decode ({reason[-1] if reason else 'no video stream'})")


def cut_segments(frames, cuts, last, name):
    """Yields the 49 frames of every segment of the cuts: its own 48 and the one that follows it in the file.

    Frames are read one by one, so memory does not grow with the video's length.
    """
    def padded():
        for frame in frames:
            yield frame
        yield from [frame] * (SLACK + 1)                            # where the file has no more, its last frame again

    starts = {cut.begin + SEGMENT * i for cut in cuts for i in range(len(cut.paragraphs))}
    block = []
    for position, frame in enumerate(padded()):
        if len(block) == SEGMENT:
            yield np.stack([*block, frame])
            block = []
        if position in starts or block:
            block.append(frame)
        if position >= last:
            return
    raise UserError(f"{name}: the video ends or stops decoding after {(position - SLACK) / FPS:.1f} s, "
                    f"but the scenes of {Path(name).stem}.json last until {last / FPS:.1f} s")


@dataclass(frozen=True)
class Job:
    """One video to ingest; `source` tells whether a file on disk was made from the same video, storyboard and encoders."""
    video: Path
    target: Path
    cuts: tuple
    last: int
    source: str

    @property
    def texts(self):
        return [text for cut in self.cuts for text in mark_scene(cut.paragraphs)]


def video_size(video):
    """(width, height) of a video, None if it does not decode."""
    import imageio_ffmpeg
    frames = imageio_ffmpeg.read_frames(str(video))
    try:
        return next(frames)["size"]
    except (OSError, RuntimeError, StopIteration):
        return None
    finally:
        frames.close()


def plan_job(video, out, codec, text_encoder):
    """Checks the storyboard of a video before anything is decoded, and names the scenes that are dropped."""
    board = video.with_suffix(".json")
    if not board.exists():
        raise UserError(f"{video.name}: has no storyboard, {board.name} must be beside it")
    cuts, last = read_cuts(board)
    stat = video.stat()
    source = f"{video.name} {stat.st_size} {stat.st_mtime_ns} {short_hash(board.read_bytes())} {codec.id} {text_encoder.id}"
    return Job(video, out / f"{video.stem}.safetensors", tuple(cuts), last, source)


def read_metadata(path):
    """The metadata of an ingested file; an empty dict when there is none or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def ingest_video(job, codec, text_encoder, advance):
    """One video -> one file of latents and text embeddings, unless it is there already. Calls advance(segments done)."""
    if read_metadata(job.target).get("source") == job.source:
        return advance(len(job.texts))
    width, height = video_size(job.video) or (codec.width, codec.height)
    if width < codec.width or height < codec.height:
        raise UserError(f"{job.video.name}: its pictures of {width} x {height} are smaller than {codec.width} x {codec.height}; "
                        "enlarge them first, or give a smaller --width and --height")
    frames = read_frames(job.video, codec.height, codec.width)
    latents = []
    for segment in cut_segments(frames, job.cuts, job.last, job.video.name):
        latents.append(codec.encode(segment).half())
        advance(1)
    tensors = {"latents": torch.stack(latents), "text": text_encoder.encode(job.texts, where=job.video.name).half()}
    if hasattr(text_encoder, "marks"):
        tensors["marks"] = text_encoder.marks
    metadata = {"format": FORMAT, "source": job.source, "codec": codec.id, "scale": str(codec.scale), "fps": str(FPS),
                "text_encoder": text_encoder.id, "segments": str(len(latents)),
                "scenes": json.dumps([cut.paragraphs for cut in job.cuts]),
                "places": json.dumps([cut.place for cut in job.cuts for _ in cut.paragraphs])}
    with atomic(job.target) as partial:
        save_file(tensors, partial, metadata)


def ingest(videos, out, codec, text_encoder):
    """Takes every video of the folder `videos`, NAME.mp4 with NAME.json beside it, to latents in the folder `out`.

    `codec` and `text_encoder` are a pair of open_encoders. Files that are already there are kept. A bad video does not stop the others;
    a UserError at the end names every one that was left out.
    """
    videos, out = Path(videos), Path(out)
    if not videos.is_dir():
        raise UserError(f"{videos}: no such folder")
    paths = sorted(path for path in videos.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES and path.name[0] != ".")
    if not paths:
        raise UserError(f"{videos}: no videos in this folder")
    jobs, problems = [], []
    for path in paths:
        try:
            if path.stem in [job.video.stem for job in jobs]:
                raise UserError(f"{path.name}: another video here has the same name before the dot")
            jobs.append(plan_job(path, out, codec, text_encoder))
        except UserError as error:
            problems.append(str(error))

    def work(job, advance):
        try:
            ingest_video(job, codec, text_encoder, advance)
        except UserError as error:
            problems.append(str(error))

    in_parallel(work, jobs, "ingest", "segment", total=sum(len(job.texts) for job in jobs), threads=codec.threads)
    write_index(out, codec, text_encoder)
    if problems:
        raise UserError(f"{len(problems)} of {len(paths)} videos were left out: " + "; ".join(sorted(problems)))


def write_index(out, codec, text_encoder):
    """index.json: what the folder holds. Files made by another codec or text encoder are not listed."""
    files = []
    for path in sorted(out.glob("*.safetensors")):
        metadata = read_metadata(path)
        if (metadata.get("codec"), metadata.get("text_encoder")) == (codec.id, text_encoder.id):
            files.append({"file": path.name, "segments": int(metadata["segments"]), "places": json.loads(metadata.get("places", "[]"))})
    index = {"format": FORMAT, "codec": codec.id, "scale": codec.scale, "fps": FPS,
             "latents": [13, codec.channels, codec.height // codec.down_space, codec.width // codec.down_space],
             "text_encoder": text_encoder.id, "text": [text_encoder.length, text_encoder.dim], "videos": files}
    with atomic(out / "index.json") as partial:
        partial.write_text(json.dumps(index, indent=1) + "\n")


# 8. The loader ----------------------------------------------------------------------------------------------


def check_encoders(where, made_with, ids, remedy):
    """Raises UserError if the ids of codec or text encoder differ: numbers of one mean nothing to another."""
    for kind, name in ids.items():
        if made_with.get(kind) != name:
            raise UserError(f"{where} was made with the {kind.replace('_', ' ')} {made_with.get(kind)}, not {name}; {remedy}")


def encoders_of(ids, where, vae, text_encoder, vae_scale, size, text, device="cpu"):
    """Codec and text encoder of numbers that were made with `ids`; None in place of CogVideoX's if its folder is not given."""
    real = ids["codec"].startswith("cogvideox"), ids["text_encoder"].startswith("t5")
    pair = open_encoders(vae, text_encoder, vae_scale, size, text, device)
    codec, text_encoder = (encoder if given or not own else None for encoder, given, own in zip(pair, (vae, text_encoder), real))
    remedy = "ingest the videos and train again, or name the folder and the scale they were made with"
    known = {"codec": codec and codec.id, "text_encoder": text_encoder and text_encoder.id}
    check_encoders(where, ids, {kind: name for kind, name in known.items() if name}, remedy)
    return codec, text_encoder


def returns(places):
    """Whether a place comes back after another one: A B A, A A B C A."""
    changes = [place for place, before in zip(places, [object(), *places]) if place != before]
    return len(changes) > len(set(changes)) and None not in places


class Runs:
    """Every run of `segments` consecutive segments of the ingested videos in `folder`; len() counts them. If there are runs in which a
    place returns, only these.

    Raises UserError: folder or index missing, a damaged file, no video long enough.
    """
    in_memory = 1 << 30                                             # bytes up to which everything is kept in memory

    def __init__(self, folder, segments):
        self.folder, self.segments = Path(folder), segments
        if not (self.folder / "index.json").exists():
            raise UserError(f"{folder}: no dataset here, make one with python dataset.py --ingest VIDEOS --out {folder}")
        self.index = read_json(read_text(self.folder / "index.json"), f"{folder}/index.json")
        if not isinstance(self.index, dict) or self.index.get("format") != FORMAT:
            raise UserError(f"{folder}/index.json: not of the format {FORMAT}; ingest the videos again")
        self.encoders = {kind: self.index[kind] for kind in ("codec", "text_encoder")}
        videos = self.index["videos"]
        self.runs = [(i, start) for i, video in enumerate(videos) for start in range(video["segments"] - segments + 1)]
        if not self.runs:
            longest = max((video["segments"] for video in videos), default=0)
            raise UserError(f"{folder}: no video has {segments} segments, the longest has {longest}")
        self.runs = [(i, start) for i, start in self.runs if returns(videos[i].get("places", [])[start:start + segments])] or self.runs
        size = sum(video["segments"] for video in videos) * 2 * np.prod(self.index["latents"])
        self.videos = [self.open(video, whole=size < self.in_memory) for video in videos]

    def open(self, video, whole):
        """(latents [S, 13, C, h, w], text [S, N, dim]), float16: tensors, or slices that read from the disk."""
        path = self.folder / video["file"]
        try:
            file = safe_open(path, "pt")
            latents, text = [file.get_slice(name) for name in ("latents", "text")]
            shapes = ([video["segments"], *self.index["latents"]], [video["segments"], *self.index["text"]])
            if (latents.get_shape(), text.get_shape()) != shapes:
                raise UserError(f"{path}: its shapes are not those of index.json; ingest the videos again")
            return (latents[:], text[:]) if whole else (latents, text)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: missing or damaged ({error}); ingest the videos again") from None

    def __len__(self):
        return len(self.runs)

    def storyboard(self, number):
        """The Segments of a run."""
        i, start = self.runs[number]
        scenes = json.loads(read_metadata(self.folder / self.index["videos"][i]["file"])["scenes"])
        board = [Segment(text, None, scene) for scene, paragraphs in enumerate(scenes) for text in mark_scene(paragraphs)]
        return board[start:start + self.segments]

    def run(self, number):
        """One run: a run drops the first latent of all its segments but the first."""
        i, start = self.runs[number]
        latents, text = [tensor[start:start + self.segments] for tensor in self.videos[i]]
        rest = rearrange(latents[:, 1:], "S t C h w -> (S t) C h w")
        return torch.cat([latents[0, :1], rest]), text                        # [12 S + 1, C, h, w], [S, N, dim]

    def batch(self, indices):
        """latents float32 [B, 12 S + 1, C, h, w] and text float32 [B, S, N, dim] of the runs of these numbers."""
        latents, texts = zip(*[self.run(number) for number in indices])
        return torch.stack(latents).float(), torch.stack(texts).float()


# 9. The command line ----------------------------------------------------------------------------------------


def main():
    parser = Parser(prog="dataset.py", description="The pocket world, and real videos, as data for ttt_minute.py.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--render", type=int, metavar="N", help="write N episodes of the pocket world into --out")
    action.add_argument("--ingest", metavar="VIDEOS", help="take a folder of NAME.mp4 and NAME.json to latents in --out")
    action.add_argument("--storyboard", type=int, metavar="SEED", help="print a storyboard that training never sees")
    action.add_argument("--train_codec", action="store_true", help="make the codec in assets/ again; with --height 128 the one for larger pictures")
    parser.add_argument("--out", metavar="DIR", help="the folder to write to")
    add_encoder_flags(parser)
    parser.add_argument("--height", type=int, help="of frames (default: 64, or the VAE's own)")
    parser.add_argument("--width", type=int, help="of frames (default: 96, or the VAE's own)")
    parser.add_argument("--text_len", type=int, metavar="N", help="tokens of a segment's text (default: 40, with T5 226)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="for VAE and T5 (default: cuda where there is one)")
    parser.add_argument("--segments", type=int, default=21, help="3-second segments of an episode, 1 to 21 (default 21)")
    parser.add_argument("--seed", type=int, default=0, help="the first episode's seed (default 0)")
    args = parser.parse_args()
    if not 1 <= args.segments <= 21:
        parser.error(f"--segments {args.segments}: an episode has 1 to 21 segments")
    if min(args.seed, args.storyboard or 0) < 0 or (args.render is not None and args.render < 1):
        parser.error("seeds count from 0 and --render from 1")
    if args.train_codec and args.height not in (None, 64, 128):
        parser.error(f"--height {args.height}: there is a codec for pictures 64 high and one for 128")
    if (args.render or args.ingest) and not args.out:
        parser.error("--out DIR is missing, the folder to write to")
    if args.render:
        render_world(args.out, args.render, args.segments, args.seed)
    elif args.ingest:
        size, text = (args.height, args.width), (args.text_len, None)
        ingest(args.ingest, args.out, *open_encoders(args.vae, args.text_encoder, args.vae_scale, size, text, args.device))
    elif args.train_codec:
        train_codec(args.height or 64)
    else:
        print(storyboard_text(episode(TEST_SEEDS + args.storyboard, args.segments)), end="")


if __name__ == "__main__":
    from dataset import main, run_main                              # the same UserError as everybody else's
    run_main(main)
