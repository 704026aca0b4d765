"""From a storyboard to a video, and what videos of the pocket world say about a layer.

    python sample.py                                                    # a minute, by the weights in assets/
    python sample.py --segments 3                                       # nine seconds: the first to try
    python sample.py --stage 9s --storyboard story.txt --out video.mp4  # your own: Format 3, JSON or JSONL
    python sample.py --stage 9s --evaluate                              # the paper's four axes, in pixels
    python sample.py --stage 18s --compare --layers local ttt_mlp       # trained layers side by side
    python sample.py --stage 18s --compare --train_seed 1               # those of ttt_minute.py --seed 1


Writes mp4, GIF and a contact sheet, one row per scene. The sampler stands in ttt_minute.py: `generate`.
"""

import argparse
import base64
import itertools
import json
import os
import random
import sys
import time
from collections import namedtuple
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import imageio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from einops import rearrange, reduce, repeat
from PIL import Image, ImageDraw

import dataset
from dataset import CHARACTER_COLOURS, CHARACTERS, FOURS, FRAMES, HEIGHT, PLACES, SEGMENT, TEST_SEEDS, check
from ttt_minute import (ASSETS, LAYERS, PRESETS, STAGES, Config, add_noise, find_checkpoint, generate,
                        is_first, load_checkpoint, pick_device, read_facts, run_folder, save_checkpoint)


# 1. Reading a video back --------------------------------------------------------------------------
# The pocket world is drawn from known shapes, so a video of it can be read back: which room, wall and
# furniture the median picture of a segment fits best, and which sprite, in which pose and colour, fits
# best where in every drawing (one per latent frame).

POSES = "stand air walk0 walk1 walk2 walk3 wave0 wave1 wave2 wave3".split()
THERE = 0.035                   # mean squared error (of 0 ... 1) below which a sprite counts as seen
LIKE = 0.12                     # error of a pixel (of 0 ... 1) up to which it counts as drawn by the world

# Somebody in a segment: FRAMES times (x, y, pose, facing right), feet in picture heights; how well the sprite
# fits, [FRAMES]; the colour, the same in all drawings.
Track = namedtuple("Track", "drawings error colour")


def half(pictures):
    """float32 [..., h, w, c] at half the size."""
    return reduce(np.float32(pictures), "... (h a) (w b) c -> ... h w c", "mean", a=2, b=2)


@lru_cache(maxsize=None)
def backgrounds():
    """Every room with every wall and furniture: [(room, wall, furniture, its colour)] and their pictures,
    float32 [n, 64, 96, 3] of 0 ... 1."""
    names = dataset.ROOMS, dataset.WALL_COLOURS, dataset.FURNITURE, dataset.FURNITURE_COLOURS
    known = list(itertools.product(*names))
    return known, half([dataset.draw_background(*room) for room in known]) / 255


@lru_cache(maxsize=None)
def sprites(who):
    """All K sprites of a character at half size, keys (colour, pose, facing right), paint [K, 3, 40, 32] and
    masks [K, 1, 40, 32]."""
    keys = list(itertools.product(CHARACTER_COLOURS, POSES, (False, True)))
    paint, clear = map(np.stack, zip(*[dataset.sprite(who, *key) for key in keys]))
    row = (0, 0), (0, 1), (0, 0), (0, 0)                                # one more: 79 are odd
    paint, clear = half(np.pad(paint, row) / 255), half(np.pad(clear, row, constant_values=1))
    paint, clear = (rearrange(torch.from_numpy(x), "K h w c -> K c h w") for x in (paint, clear))
    mask = (clear < 0.5).float()
    return keys, paint / (1 - clear).clamp_min(0.5) * mask, mask


@torch.no_grad()
def read_track(pictures, who, view):
    """The sprite that fits best in each of uint8 pictures [n, 64, 96, 3], of one colour in all: a Track.
    `view` [n, 64, 96] is False where somebody else stands in front."""
    keys, paint, mask = sprites(who)
    colours, side, top = len(CHARACTER_COLOURS), 8, 4                   # rows above 4 are never reached
    poses, border = mask[:len(mask) // colours], (side, side, 0, 4)     # masks do not depend on the colour
    view = nnf.pad(torch.from_numpy(view[:, None, top:]).float(), border)
    pictures = rearrange(torch.from_numpy(pictures[:, top:]).float() / 255, "n h w c -> n c h w")
    pictures = nnf.pad(pictures, border) * view
    # Sum over a sprite's visible pixels of (picture - paint)^2, for all sprites and places at once.
    energy = nnf.conv2d(pictures.square().sum(1, keepdim=True), poses).repeat(1, colours, 1, 1)
    pixels = nnf.conv2d(view, poses).repeat(1, colours, 1, 1)
    error = energy - 2 * nnf.conv2d(pictures, paint) + nnf.conv2d(view, paint.square().sum(1, keepdim=True))
    visible = pixels > 0.3 * mask.sum((1, 2, 3))[:, None, None]
    error = torch.where(visible, error / (3 * pixels), 1.0)             # [n, K, y, x]
    best = rearrange(error, "n (colour k) y x -> colour n (k y x)", colour=colours).min(-1)
    colour = best.values.clamp(max=2 * THERE).mean(1).argmin().item()
    k, y, x = np.unravel_index(best.indices[colour].numpy(), (len(poses), *error.shape[2:]))
    found = [keys[colour * len(poses) + i] for i in k]
    feet_y, feet_x = dataset.FEET_AT
    x, y = (2 * (x - side) + feet_x) / HEIGHT, (2 * (y + top) + feet_y) / HEIGHT
    drawings = [(*feet, pose, right) for *feet, (_, pose, right) in zip(x, y, found)]
    return Track(drawings, best.values[colour].numpy(), found[0][0])


def draw(background, tracks):
    """uint8 [FRAMES, 128, 192, 3]: a room, and everybody where they were seen."""
    pictures = repeat(background, "h w c -> n h w c", n=FRAMES).copy()
    colours = {who: track.colour for who, track in tracks.items()}
    for n, picture in enumerate(pictures):
        seen = {who: track.drawings[n] for who, track in tracks.items() if track.error[n] < THERE}
        dataset.paste(picture, seen, colours)
    return pictures


def read_segment(frames):
    """uint8 frames [SEGMENT, 64, 96, 3] -> the room's name, what is hidden about it (wall, furniture, its
    colour), {who: Track}, and the fraction of pixels that are as the world would draw all this."""
    known, rooms = backgrounds()
    error = np.abs(rooms - np.float32(np.median(frames, axis=0) / 255))
    room, *hidden = known[error.clip(max=0.3).mean((1, 2, 3)).argmin()]    # clipped: characters count little
    background = dataset.draw_background(room, *hidden)
    pictures, tracks = frames[1::FOURS], {}                             # one frame of every drawing
    for who in sorted(CHARACTERS, reverse=True):                        # Pip is in front
        white, black = (half(draw(np.full_like(background, shade), tracks))[..., 0] for shade in (255, 0))
        tracks[who] = read_track(pictures, who, white - black > 128)
    error = np.abs(half(draw(background, tracks)) - pictures).mean(-1) / 255
    return room, hidden, tracks, np.mean(error < LIKE)


# 2. The paper's four axes (4.2), and what came back -----------------------------------------------

AXES = "text following", "motion naturalness", "aesthetics", "temporal consistency"
ROOM = "wall", "furniture", "furniture's colour"                        # what an episode hides about a room
HIDDEN = dict(zip(ROOM, (dataset.WALL_COLOURS, dataset.FURNITURE, dataset.FURNITURE_COLOURS)))
CHANCE = {name: 1 / len(HIDDEN.get(name, CHARACTER_COLOURS)) for name in (*ROOM, *CHARACTERS)}


def deed(drawings):
    """What somebody does in a segment, as the text would say it: (verb, from where, to where)."""
    x, y, poses, _ = map(np.array, zip(*drawings))
    start, end = (min(PLACES, key=lambda place: abs(PLACES[place] - at)) for at in (x[0], x[-1]))
    if start != end:
        arrived = np.argmax(np.abs(x - x[0]) > 0.85 * abs(x[-1] - x[0]))
        ran = {start, end} == {"left", "right"} or arrived < 2 / 3 * FRAMES
        return "run" if ran else "walk", start, end
    if np.ptp(y) > 0.07:
        return "jump", start, end
    return "wave" if sum(pose.startswith("wave") for pose in poses) > FRAMES / 4 else "stand", start, end


def natural(track):
    """Fraction of the steps between drawings in which a character neither vanishes, nor moves farther than it
    can run or jump, nor jitters."""
    dx, dy = np.diff([feet for *feet, _, _ in track.drawings], axis=0).T
    there, far = track.error < THERE, (np.abs(dx) > 1.32 / FRAMES) | (np.abs(dy) > 1.44 / FRAMES)
    back = (dx[1:] * dx[:-1] < 0) & (np.minimum(np.abs(dx[1:]), np.abs(dx[:-1])) > 0.02)
    return np.mean(there[1:] & there[:-1] & ~far & ~np.append(False, back))


def evaluate(frames, episode):
    """Reads a video of an episode, uint8 frames [SEGMENT S + 1, h, w, 3]. Returns
    scores    {name: 0 ... 1}: the four axes, then how often each hidden attribute was as it had been when its
              room or character was first seen (nan where nothing returned)
    returns   [(room or character, segments since first seen, fraction of its attributes that came back)]
    """
    frames = dataset.resize(frames, 64 / frames.shape[1])
    scores, returns, first = {name: [] for name in (*AXES, *CHANCE)}, [], {}
    text, motion, like, consistency = (scores[axis] for axis in AXES)
    for i, segment in enumerate(episode.segments):
        scene = episode.scenes[segment.scene]
        truth = scene.drawings[FRAMES * (i - scene.first) + 1:][:FRAMES]
        room, hidden, tracks, drawn = read_segment(frames[SEGMENT * i + 1:SEGMENT * (i + 1) + 1])
        right, shown = [room == scene.room], {scene.room: dict(zip(ROOM, hidden))}
        for who in CHARACTERS:
            there, cast = np.mean(tracks[who].error < THERE) > 0.5, who in scene.cast
            right.append(there == cast)
            if cast:
                asked, done = deed([drawing[who] for drawing in truth]), deed(tracks[who].drawings)
                right += [there and did == meant for did, meant in zip(done, asked)]
                motion.append(natural(tracks[who]))
            if cast and there:
                shown[who] = {who: tracks[who].colour}
        text.append(np.mean(right))
        like.append(drawn)
        for what, attributes in shown.items():
            then, before = first.setdefault(what, (i, attributes))
            if then < i:
                for name, value in attributes.items():
                    scores[name].append(value == before[name])
                consistency.append(np.mean([scores[name][-1] for name in attributes]))
                returns.append((what, i - then, float(consistency[-1])))
    return {name: mean_and_error(values)[0] for name, values in scores.items()}, returns


def mean_and_error(values):
    """The mean of all that is not nan, and its standard error; nan where there is too little."""
    values = [float(value) for value in values if not np.isnan(value)]
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return float(np.mean(values)) if len(values) else np.nan, float(error)


# 3. Memory, read from the loss --------------------------------------------------------------------

def stories_that_return(segments, videos):
    """Held-out episodes whose last scene is one segment in a place that was seen before."""
    found, seeds = [], itertools.count(TEST_SEEDS)
    while len(found) < videos:
        episode = dataset.episode(next(seeds), segments)
        *before, last = episode.scenes
        if last.segments == 1 and last.room in [scene.room for scene in before]:
            found.append(episode)
    return found


def other_pasts(episode, stranger):
    """The same story with other colours: {what is different: Episode}."""
    place = episode.scenes[-1].room
    neighbour = next(scene.room for scene in reversed(episode.scenes) if scene.room != place)
    rooms = episode.rooms | {place: episode.rooms[neighbour], neighbour: episode.rooms[place]}
    colours = list(episode.colours.values())
    free = [colour for colour in CHARACTER_COLOURS if colour not in colours]
    return {"a stranger's room": replace(episode, rooms=stranger.rooms, colours=stranger.colours),
            "rooms exchanged": replace(episode, rooms=rooms),
            "characters recoloured": replace(episode, colours=dict(zip(episode.colours, free))),
            "characters swapped": replace(episode, colours=dict(zip(episode.colours, colours[::-1])))}


@torch.no_grad()
def memory_in_loss(model, codec, text_encoder, segments, videos=16, levels=(640, 760, 880)):
    """What a network gains from earlier scenes, without sampling: the loss of the last segment of stories
    that end where they were before, and its rise when the scenes before had other colours. Only a memory of
    *whose* they were notices an exchange. Small things are decided at lower noise than walls: several t.

    Returns {t: {"loss": (mean, standard error over stories), what was different: (mean rise, its error)}}.
    """
    device = next((parameter.device for parameter in model.parameters()), "cpu")
    last, losses = FRAMES * (segments - 1), {t: [] for t in levels}
    for episode in stories_that_return(segments, videos):
        pasts = other_pasts(episode, dataset.episode(episode.seed + segments * videos, segments))
        shot = [dataset.render(story, codec.height, codec.width) for story in (episode, *pasts.values())]
        own, *others = map(codec.encode, shot)
        rooms = [episode.scenes[segment.scene].room for segment in episode.segments]
        there = torch.tensor([rooms[max(n - 1, 0) // FRAMES] == rooms[-1] for n in range(len(own))])
        before = torch.arange(len(own)) < last                          # but for the shared frame
        changed = [rearrange(mask, "T -> T 1 1 1") for mask in (before & there, before, before, before)]
        stories = torch.stack([own, *map(torch.where, changed, others, [own] * 4)]).to(device)
        text = dataset.embed(episode.segments, text_encoder, "story")[0].expand(5, -1, -1, -1).to(device)
        noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(episode.seed)).to(device)
        for t in levels:
            batch_t = torch.full((len(stories),), t, device=device)
            x_t, v = add_noise(stories, batch_t, noise, model.config.snr_shift)
            error = (model(x_t, text, batch_t) - v)[:, last + 2:]       # past the shared frame
            losses[t].append(error.square().mean((1, 2, 3, 4)).cpu())
    found = {}
    for t in levels:
        own, *others = torch.stack(losses[t]).numpy().T
        found[t] = {"loss": mean_and_error(own)}
        found[t] |= {name: mean_and_error(other - own) for name, other in zip(pasts, others)}
    return found


# 4. Scoring a layer, and comparing several --------------------------------------------------------

def score(args, model, codec, text_encoder, segments, seeds, files):
    """Samples held-out storyboards of some seeds into mp4 files and scores them. Returns {"scores",
    "returns", "memory"} for `summary`, and the first video's frames."""
    memory, videos = memory_in_loss(model, codec, text_encoder, segments), []
    found = dict(scores=[], returns=[], memory=memory)
    for seed, file in zip(seeds, files):
        episode = dataset.episode(TEST_SEEDS + seed, segments)
        text, _ = dataset.embed(episode.segments, text_encoder, "held-out storyboard")
        latents = generate(model, text, seed=seed, steps=args.steps, guidance=args.guidance)
        videos.append(codec.decode(latents))
        dataset.save_video(videos[-1], episode.segments, file)
        scores, returns = evaluate(videos[-1], episode)
        found["scores"].append(scores)
        found["returns"] += returns
    return found, videos[0]


def summary(found):
    """A column of the table, {line: text}."""
    lines = {}
    for name in found["scores"][0]:
        line = f"  {name} (chance {CHANCE[name]:.2f})" if name in CHANCE else name
        lines[line] = "%.3f +- %.3f" % mean_and_error([scores[name] for scores in found["scores"]])
    for kind, names in ("rooms", dataset.ROOMS), ("characters", CHARACTERS):
        for line, low, high in ("1-4 segments", 1, 4), ("5 and more", 5, np.inf):
            same = [back for what, after, back in found["returns"] if what in names and low <= after <= high]
            lines[f"{kind} after {line}"] = f"{mean_and_error(same)[0]:.3f} ({len(same)})"
    for t, losses in found["memory"].items():
        lines |= {f"{name} at t {t}": "%+.4f +- %.4f" % value for name, value in losses.items()}
    return {line: text.replace(" +- nan", "").replace("nan", "-") for line, text in lines.items()}


def print_table(columns, note):
    """{head: {line: text}}, all with the same lines, and a note below."""
    for line in ("", *next(iter(columns.values()))):
        cells = [column[line] if line else head for head, column in columns.items()]
        print(f"{line:<34}" + "".join(f"{cell:>22}" for cell in cells))
    print(note)


def plot_consistency(found, path):
    """Temporal consistency against the segments since the first appearance, one line per layer."""
    with dataset.plot(path, ylim=(0, 1.03), xlabel="segments since the first appearance",
                      ylabel="hidden attributes that came back") as axes:
        for layer, own in found.items():
            distances = sorted({after for _, after, _ in own["returns"]})
            means = [np.mean([back for _, after, back in own["returns"] if after == d]) for d in distances]
            axes.plot(distances, means, marker="o", label=layer)
        axes.axhline(np.mean([CHANCE[name] for name in ROOM]), color="0.6", linestyle=":", label="chance")
        axes.locator_params(axis="x", integer=True)


def side_by_side(videos, folder):
    """The same story by several layers, {layer: uint8 frames [n, h, w, 3]}, in columns: comparison.gif plays
    it, comparison.png has one picture a segment."""
    films = [dataset.resize(video[1::FOURS], 192 / video.shape[2]) for video in videos.values()]
    films = np.concatenate(films, axis=2)
    head = Image.new("RGB", (films.shape[2], 16), "white")
    for column, layer in enumerate(videos):
        ImageDraw.Draw(head).text((192 * column + 4, 2), layer, fill="black")
    imageio.imwrite(folder / "comparison.png", np.concatenate([head, *films[FRAMES // 2::FRAMES]]))
    films = films[::max(1, len(films) // 72)]                           # long stories run faster
    pictures = [np.concatenate([head, film]) for film in films]
    imageio.mimwrite(folder / "comparison.gif", pictures, duration=2000 / dataset.FPS, loop=0)


# 5. People (4.2) ----------------------------------------------------------------------------------

def elo(wins, shared=0.0):
    """Scores [..., n] with mean 1000, from wins [..., n, n], how often i was preferred to j: the maximum
    likelihood of Bradley and Terry, by whom that has probability 1 / (1 + 10^((score_j - score_i) / 400)).
    `shared` votes are added to each side of a pair, so that who never won has a score, too."""
    wins = wins + shared * (1 - torch.eye(wins.shape[-1], dtype=wins.dtype))
    strength = torch.ones_like(wins[..., 0])
    for _ in range(1000):                                               # Zermelo's iteration
        meetings = (wins + wins.mT) / (strength[..., None] + strength[..., None, :])
        strength = wins.sum(-1) / meetings.sum(-1)
        strength = strength / strength.log().mean(-1, keepdim=True).exp()
    return 1000 + 400 * strength.log10()


def elo_errors(wins, resamples=200, shared=0.0):
    """Standard deviation [n] of elo if each pair's votes are drawn again with replacement: the bootstrap."""
    votes = (wins + wins.mT).expand(resamples, *wins.shape)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.binomial(votes, (wins / votes).nan_to_num(), generator=generator).triu(1)
    return elo(drawn + (votes.triu(1) - drawn).mT, shared).std(0)


def print_elo(path):
    """--elo: the paper's table from what vote.html saved: a row a layer, a column an axis and one for all."""
    with dataset.reading(path):
        votes = json.loads(path.read_text())
        layers = sorted({layer for vote in votes for layer in (vote["winner"], vote["loser"])})
        wins = torch.zeros(len(AXES), len(layers), len(layers), dtype=torch.float64)
        for vote in votes:
            wins[AXES.index(vote["axis"]), layers.index(vote["winner"]), layers.index(vote["loser"])] += 1
    columns = {}
    for name, own in zip((*AXES, "all axes"), (*wins, wins.sum(0))):
        pairs = zip(elo(own, 0.5).tolist(), elo_errors(own, shared=0.5).tolist())
        columns[name] = dict(zip(layers, ["%.0f +- %3.0f" % pair for pair in pairs]))
    print_table(columns, f"{len(votes)} votes; +-: standard deviation over 200 bootstrap resamples")


def write_vote_page(videos, path, texts=()):
    """A page that asks people: blind pairs of {layer: mp4 files, one a story} in random order, four axes."""
    inside = lambda file: "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()
    videos, page = {layer: [*map(inside, files)] for layer, files in videos.items()}, ASSETS / "vote.html"
    asked = itertools.product(AXES, range(min(map(len, videos.values()))), itertools.combinations(videos, 2))
    pairs = [dict(axis=axis, story=story, pair=random.sample(pair, 2)) for axis, story, pair in asked]
    random.shuffle(pairs)
    facts = json.dumps([pairs, texts, videos]).replace("<", "\\u003c")
    path.write_text(page.read_text().replace("%FACTS%", facts))


# 6. The command line ------------------------------------------------------------------------------

def parse_arguments():
    parser = argparse.ArgumentParser(description="Films a storyboard by a trained stage.", allow_abbrev=False)
    add, count = parser.add_argument, dataset.positive
    add("--stage", choices=STAGES, default="63s", help="the stage that was trained (default 63s)")
    add("--preset", choices=PRESETS, default="pocket")
    add("--layer", choices=LAYERS, default="ttt_mlp")
    add("--storyboard", metavar="FILE", help="Format 3 text, JSON or JSONL (default: a held-out one)")
    add("--segments", type=count, metavar="N", help="of the held-out storyboard (default: the stage's)")
    add("--out", type=Path, metavar="FILE", help="the video (default OUT_DIR/PRESET-LAYER/STAGE/video.mp4)")
    add("--out_dir", type=Path, default="out", metavar="DIR", help="where runs were written (default out)")
    add("--seed", type=dataset.seed_number, default=0, help="of the noise and the held-out storyboard")
    add("--train_seed", type=dataset.seed_number, default=0, help="of the training run to open (default 0)")
    add("--steps", type=dataset.whole_number(1, 1000), default=50, help="DDIM steps (default 50)")
    add("--guidance", type=dataset.finite, nargs=2, default=(1.0, 4.0), metavar=("LOW", "HIGH"))
    add("--negative", metavar="TEXT", help="what to move away from, where the storyboard names nothing")
    add("--evaluate", action="store_true", help="score held-out storyboards on the paper's four axes")
    add("--compare", action="store_true", help="score all layers that are trained, or those of --layers")
    add("--layers", nargs="+", choices=LAYERS, metavar="LAYER", help="what --compare compares")
    add("--videos", type=count, default=8, metavar="N", help="how many to score, from --seed on (default 8)")
    add("--elo", type=Path, metavar="VOTES", help="print Elo scores of the votes that vote.html saved")
    add("--export", metavar="FILE", help="write the stage's weights in half precision, as in assets/")
    dataset.add_encoder_flags(parser)
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--context_parallel", type=count, default=1, metavar="C", help="torchrun: C processes share a video")
    add("--shard", type=count, metavar="N", help="torchrun: N processes share the weights (default all)")
    return parser.parse_args()


def open_stage(args, config, device):
    """A trained stage: its file, its facts, and the codec and text encoder that it was trained with."""
    path = find_checkpoint(args.out_dir, config, args.stage)
    check(path, f"{run_folder(args.out_dir, config, args.stage)} has no weights; train: python ttt_minute.py "
                f"--preset {config.preset} --stage {args.stage} --layer {config.layer} --seed {config.seed}")
    facts = read_facts(path)
    return path, facts, *dataset.open_encoders(args.vae, args.text_encoder, args.vae_scale,
                                               facts["config"]["text_len"], device, facts["encoders"])


def compare(args, configs, segments, device):
    """Scores those layers that are trained, by configs, on the same stories, and shows them side by side."""
    opened, found, videos, files = {}, {}, {}, {}
    for config in configs:
        try:
            opened[config] = open_stage(args, config, device)
        except dataset.UserError as error:
            print(f"{config.layer} is left out: {error}", file=sys.stderr)
    check(opened, "no layer can be scored")
    seeds = range(args.seed, args.seed + args.videos)
    for config, (path, _, codec, text_encoder) in opened.items():
        folder, layer = run_folder(args.out_dir, config, args.stage), config.layer
        folder.mkdir(parents=True, exist_ok=True)
        files[layer] = [folder / f"evaluation-{seed}.mp4" for seed in seeds]
        model = load_checkpoint(path).eval().to(device)
        found[layer], videos[layer] = score(args, model, codec, text_encoder, segments, seeds, files[layer])
    if args.compare:
        folder = run_folder(args.out_dir, replace(config, layer="comparison"), args.stage)
    with dataset.atomic(folder / "comparison.json") as temporary:
        temporary.write_text(json.dumps(found) + "\n")
    plot_consistency(found, folder / "consistency.png")
    side_by_side(videos, folder)
    if args.compare:
        boards = [dataset.held_out(segments, seed) for seed in seeds]
        texts = [" ".join(segment.text for segment in board) for board in boards]
        write_vote_page(files, folder / "vote.html", texts)
    note = ("+-: standard error over videos; in brackets: how many returns were seen; loss: of a last scene\n"
            "in a place seen before, and how much it rises when the scenes before it had other colours")
    print_table({layer: summary(own) for layer, own in found.items()}, note)
    print(f"look at comparison.png and comparison.gif, or ask people with vote.html, in {folder}")


def main():
    args = parse_arguments()
    if args.elo:
        return print_elo(args.elo)
    check(args.compare or not args.layers, "--layers needs --compare")
    segments = args.segments or STAGES[args.stage].segments
    device = pick_device(args.device)
    place = lambda make: make().to(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        check(not (args.evaluate or args.compare or args.export), "torchrun: to sample a storyboard only")
        from appendix import devices
        device, place = devices.join(device, [], args.context_parallel, args.shard)
    run = dict(preset=args.preset, layer=args.layer, seed=args.train_seed)
    config = Config(**PRESETS[args.preset] | run)
    if args.evaluate or args.compare:
        check(args.preset == "pocket", "only videos of the pocket world can be read back")
        check(segments >= 3, "rooms return in stories of 3 segments or more: --stage 9s, or --segments 3")
        layers = (args.layers or LAYERS) if args.compare else [args.layer]
        return compare(args, [replace(config, layer=layer) for layer in layers], segments, device)

    out = args.out or run_folder(args.out_dir, config, args.stage) / "video.mp4"
    check(out.suffix == ".mp4" and not out.is_dir(), f"--out {out}: must be a file that ends in .mp4")
    out.parent.mkdir(parents=True, exist_ok=True)
    where = args.storyboard or "held-out storyboard"
    boards = dataset.parse_storyboard(where) if args.storyboard else [dataset.held_out(segments, args.seed)]
    boards = [[replace(s, negative=s.negative or args.negative) for s in board] for board in boards]
    texts = [None] * len(boards)
    if is_first():
        path, facts, codec, text_encoder = open_stage(args, config, device)
        if args.export:
            save_checkpoint(load_checkpoint(path).half(), args.export, **facts)
            return print(f"{args.export}: {path} in half precision")
        texts = [dataset.embed(board, text_encoder, where) for board in boards]
        del text_encoder                                                # T5 gives its memory to the network
    if dist.is_initialized():
        dist.broadcast_object_list(texts, device=torch.device("cpu"))
    dtype = torch.bfloat16 if args.preset == "5b" and device.type == "cuda" else torch.float32
    model = place(lambda: load_checkpoint(path).to(dtype)).eval()
    for number, (board, (text, negative)) in enumerate(zip(boards, texts), 1):
        begin, name = time.perf_counter(), out if len(boards) == 1 else out.with_stem(f"{out.stem}-{number}")
        latents = generate(model, text, negative, args.seed, steps=args.steps, guidance=args.guidance)
        if is_first():
            dataset.save_video(codec.decode(latents), board, name)
            print(f"{name}: {dataset.SECONDS * len(board)} seconds of video by {path}, in "
                  f"{time.perf_counter() - begin:.0f} s; contact sheet {name.with_suffix('.png')}")


if __name__ == "__main__":
    dataset.run_main(main)
