# The report of a sweep, cell by cell: `# %% <name>` begins a cell of code, `# %% [markdown] <name>` one of text.
# The cell `parameters` is filled in when a report is made; everything else runs as it stands here.
# ruff: noqa: E402

# %% parameters
SWEEP = "pruning_tradeoff"
STORE = "../.."  # the folder of the records, from here
CONFIG_DIR = None
DATE = "2026-01-01"
ALLOW_UNFAIR = False

# %% title
import numpy as np
import pandas as pd

from sparsebench import __version__
from sparsebench.analysis.selection import order
from sparsebench.analysis.statistics import swap_rate
from sparsebench.reports import (
    answers,
    cost_figures,
    crossings,
    data,
    facts,
    figures,
    length_law,
    levels,
    multiples,
    over_tasks,
    published,
    show,
)
from sparsebench.reports.style import drawing, looks

sweep = data.load(SWEEP, STORE, CONFIG_DIR)
runs = sweep.runs  # one row a planned run, whatever became of it
looks = looks(sweep.methods, sweep.naive)
counted = runs[runs["state"] == "ok"]  # finished, and at the sparsity that was asked for
source = f"store revision {sweep.revision}"
question = sweep.spec.summary if sweep.spec and sweep.spec.summary else "What is lost, and what is saved?"
show.title(
    SWEEP,
    f"{question}.",
    {
        "date": DATE,
        "records": f"{len(counted)} of {len(runs)} planned runs count",
        "store revision": sweep.revision,
        "made by": f"sparsebench {__version__}",
        "again with": f"python -m sparsebench report {SWEEP}",
    },
)
for note in sweep.notes:
    show.warn(note)

# %% [markdown] in_short
# ## In short
# What the records below say, in sentences made from them. Every number here comes from a table further down.

# %% levels
# One point of a curve: a model, task, method and requested level, averaged over seeds. Perplexities are averaged as
# their logarithm. A level with no run that counts is `hollow`: shown, and left out of every statistic.
scored = runs[runs["quality"].notna() & runs["achieved"].notna()]
scored = scored.assign(good=scored["state"] == "ok")
has_good = scored.groupby(data.LEVEL, dropna=False)["good"].transform("any")
used = scored[scored["good"] | ~has_good]

points = used.groupby(data.LEVEL, dropna=False, sort=False).agg(
    base=("method", "first"),
    pattern=("pattern", "first"),
    achieved=("achieved", "mean"),
    quality=("quality", "mean"),
    metric=("metric", "first"),
    better=("better", "first"),
    n=("n", "min"),
    seeds=("run_id", "size"),
    hollow=("good", lambda good: not good.any()),
    flags=("why", lambda why: "; ".join(dict.fromkeys(one for one in why if one))),
    run_ids=("run_id", list),
)
outcomes = levels.paired(sweep)  # per-sample outcomes, aligned
points = pd.concat([points.reset_index(), levels.errors(used, outcomes)], axis=1)  # both in the order of the levels
sign = np.where(points["better"] == "higher", 1, -1)
log = points["metric"].map(data.is_logged)


def back(quality):
    return np.where(log, np.exp(sign * quality), sign * quality)


points["score"] = back(points["quality"])
points["ci_low"], points["ci_high"] = np.sort([back(points["low"]), back(points["high"])], axis=0)
points = points.rename(
    columns={"model_label": "model", "task_label": "task", "method_label": "method", "level": "requested"}
)
dense = points[points["method"] == "dense"].set_index(["model", "task"])
sparse = points[points["method"] != "dense"].copy()
at = pd.MultiIndex.from_frame(sparse[["model", "task"]])
sparse["loss"] = dense["quality"].groupby(level=[0, 1]).first().reindex(at).to_numpy() - sparse["quality"]

curves = ["method", "model", "task", "metric", "requested", "pattern", "achieved", "score", "se", "ci_low", "ci_high"]
curves += ["interval", "n", "seeds", "hollow", "flags", "run_ids"]
show.csv(points[curves], "curves.csv")
with open("records.csv", "w", encoding="utf-8") as file:
    file.write(data.records_csv(sweep))

# %% summary
knees = levels.knees(points)
safe = levels.safe(used[used["good"]], outcomes)
verdicts, details = facts.verdicts(sweep)
matched = levels.matched(points, outcomes)
best = levels.significantly_best(matched, outcomes)
sentences = []
sentences += facts.who_is_ahead(best) + facts.what_is_safe(safe)
main = verdicts[verdicts["counts"].astype(bool)] if len(verdicts) else verdicts
if len(main):
    good, tested = int((main["verdict"] == "reproduced").sum()), int((main["verdict"] != "untested").sum())
    rest = f"; {len(main) - tested} more could not be tested" if tested < len(main) else ""
    sentences.append(
        f"**{good} of {tested}** tested main claims that are expected at this scale are reproduced{rest}."
        if tested
        else f"None of the {len(main)} main claims that are expected at this scale could be tested on these runs."
    )
if len(runs) > len(counted):
    sentences.append(f"{len(runs) - len(counted)} of {len(runs)} planned runs do not count; they are listed below.")
show.says(*sentences)

# %% [markdown] claims
# ## Claims
# What the paper says, as an inequality over these records, and whether it holds here. *Effect*: how
# far the claimed side is ahead, with its 95% interval (nats for a perplexity). *Not counted*: not expected of small
# models, or secondary.

# %% verdicts
if verdicts.empty:
    show.empty("This sweep states no claims: nothing is tested here." if sweep.spec else sweep.notes[-1])
else:
    counts = verdicts.groupby("verdict").size()
    show.says(", ".join(f"{count} {name}" for name, count in counts.items()) + f", of {len(verdicts)} claims.")
    shown = verdicts.assign(
        counted=verdicts["counts"].map({True: "yes", False: "not counted"}),
        effect=[
            "" if pd.isna(e) else show.with_interval(e, lo, hi)
            for e, lo, hi in zip(verdicts["estimate"], verdicts["low"], verdicts["high"], strict=True)
        ],
    )
    shown["evidence"] = [
        ""
        if pd.isna(seeds)
        else f"{'' if pd.isna(n) else f'{n:.0f} samples, '}{seeds:.0f} seed{'s' * (seeds > 1)}: {scope}"
        for n, seeds, scope in zip(shown["samples"], shown["seeds"], shown["scope"], strict=True)
    ]
    columns = ["verdict", "id", "sentence", "place", "effect", "evidence", "counted", "why"]
    if shown["estimate"].notna().any() and shown["low"].notna().any():
        with drawing("verdicts"):
            drawn = figures.verdicts(verdicts)
            show.figure(drawn, "verdicts", f"Effects of the tested claims with 95% intervals, {source}.",
                        "Forest plot of the claims' effects in standard errors, coloured by verdict")  # fmt: skip
    show.table(shown[columns], "verdicts", f"Claims and verdicts, {source}. All numbers of each test: verdicts.csv.")
show.csv(verdicts, "verdicts.csv")
show.write_json(details, "verdicts.json")

# %% [markdown] runs
# ## What was run
# The grid of the newest plan, and every run that does not count, with its reason.

# %% grid
show.table(facts.grid(runs), "grid", "The grid: every key with its values.")
states = runs.groupby(["method_label", "state"]).size().unstack(fill_value=0)
states = states.reindex(columns=[one for one in data.STATES if one in states]).reset_index()
show.table(states.rename(columns={"method_label": "method"}), "states", "Runs by method and state.")
if "seconds" in runs:
    show.says(f"Total time of the runs: {show.duration(runs['seconds'].sum())}.")
if sweep.spec and sweep.spec.exclude:
    show.says("Left out of the grid by the sweep's file: " + "; ".join(map(facts.condition, sweep.spec.exclude)) + ".")

# %% not_counted
bad = runs[runs["state"] != "ok"]
if bad.empty:
    show.says("Every planned run is finished and at the sparsity that was asked for.")
else:
    columns = ["run_id", "model_label", "task_label", "method_label", "level", "achieved", "state", "why", "command"]
    names = {"model_label": "model", "task_label": "task", "method_label": "method", "level": "requested"}
    show.table(
        bad[columns].rename(columns=names), "not_counted", "Runs that do not count, and why.",
    )  # fmt: skip
for (model, task), own in outcomes.items():
    if own.why:
        show.warn(f"{model}, {task}: nothing is tested on paired samples, because {own.why}.")

# %% fairness
findings = facts.unfair(sweep, ALLOW_UNFAIR)
uneven = [one for one in findings if one.rule == "sparsity"]  # mended below: methods are compared by interpolation
refused = [one for one in findings if one.severity == "refused" and one.rule != "sparsity"]
unfair = [one for one in findings if one.severity == "watermark" and one.rule not in ("sparsity", "flagged")]
for one in [*refused, *unfair]:
    show.warn(
        f"Unfair comparison: {one.sentence}" + (" Shown all the same, because it was asked for." if unfair else "")
    )
warnings = [one.sentence for one in findings if one.severity == "warning" or one.rule == "flagged"]
if uneven:
    warnings.append(
        f"One request led to different achieved sparsities at {len(uneven)} levels; methods are therefore compared at "
        f"the same achieved sparsity, interpolated along each method's own curve. For example: {uneven[0].sentence}"
    )
if warnings:
    show.says("Read the comparisons below with this in mind.")
    show.says(*warnings)
elif not findings:
    show.says("Nothing speaks against comparing these methods.")

# %% [markdown] curves
# ## Quality against sparsity
# Achieved sparsity, never the request. Bars: 95% intervals. Dashed black: the dense model. Grey: naive baselines.
# Hollow: runs that missed their sparsity, in no statistic. A ring around a point: the largest sparsity up to which
# every level stays within the tolerance (0.05 in log perplexity, else 0.01). A point without a bar: its interval is
# not known, as where few samples all came out the same. Hover over a point for its numbers; it leads to its record.

# %% tradeoff
panels = list(dict.fromkeys(zip(points["model"], points["task"], strict=True)))
MOST = 24  # panels that are drawn one by one; beyond, a figure a task with small ones
spans = {task: figures.limits(own, sweep.naive) for task, own in points.groupby("task")}
for model, task in panels if len(panels) <= MOST else ():
    here = points[(points["model"] == model) & (points["task"] == task)]
    if (here["method"] == "dense").all():
        continue
    name = show.file_name("tradeoff", model, task)
    seeds = runs.loc[(runs["model_label"] == model) & (runs["task_label"] == task), "seed"].nunique()
    caption = f"{model}, {task}: n = {here['n'].min():.0f}, {max(seeds, 1)} seed{'s' if seeds > 1 else ''}, "
    caption += f"95% intervals ({', '.join(sorted(here['interval'].unique()))}), {source}."
    if here["score"].max() > spans[task][1]:
        caption += f" Scores above {spans[task][1]:,.4g} are off the figure."
    with drawing(name):
        drawn = figures.tradeoff(here, looks, knees[(knees["model"] == model) & (knees["task"] == task)], spans[task])
        show.figure(drawn, name, caption, f"{here['metric'].iloc[0]} over achieved sparsity, {model}, {task}")
named = points.assign(name=points["task"].str.partition(" ")[0], setting=points["task"].map(over_tasks.setting_of))
ACROSS = 3  # settings of a task side by side
settings = list(dict.fromkeys(named["setting"]))
for first in range(0, len(settings) if len(panels) > MOST else 0, ACROSS):
    across = settings[first : first + ACROSS]
    for task, own in named[named["setting"].isin(across)].groupby("name", sort=False):
        file = show.file_name("tradeoff", task, across[0])
        with drawing(file):
            drawn = multiples.tradeoffs(own, looks)
            show.figure(drawn, file, f"{task}: n = {own['n'].min():.0f}, bands of one standard error, {source}.",
                        f"{own['metric'].iloc[0]} over achieved sparsity, {task}, by size and setting")  # fmt: skip

# %% curve_table
columns = ["model", "task", "method", "requested", "achieved", "score", "ci_low", "ci_high", "interval", "n", "seeds"]
show.table(
    points[[*columns, "flags"]], "curves", f"The points of the curves, with 95% intervals, {source}.",
    digits={"achieved": ".4f"},
)  # fmt: skip

# %% knees
if knees.empty:
    show.empty("No method has levels here: there is no curve that could bend.")
else:
    show.says(
        "Where each curve bends. *tolerance*: the largest sparsity within the tolerance of dense; *breakpoint*: two "
        "lines that meet at a level, *sharpness* the ratio of their slopes; *hinge*: a fitted bend, given where it is "
        "better than a straight line by AICc; *chord* depends on where the levels end. *retention*: the mean share of "
        "the dense quality over the sparsities that all methods reach."
    )
    area = levels.retention(points)
    shown = knees.merge(area[["model", "task", "method", "retention"]], how="left", on=["model", "task", "method"])
    show.table(shown.drop(columns="levels"), "knees", f"Knees and retention, {source}.", digits={"sharpness": ".3g"})

# %% answers
written = answers.levels(sweep, counted)
if written:
    show.says(
        "Test-time compute: tokens of an answer behind its prompt, of right (*correct*) and of *wrong* ones, and all "
        "tokens over right answers (*per_correct*). A *cut* answer reached the limit: it counts with its length and as "
        "wrong. *rho*: Spearman's, of length and correctness. *collapse*: the smallest sparsity with less than half of "
        "the dense accuracy. Lengths compare within one tokenizer only."
    )
    spent = answers.spent(written)
    show.table(answers.collapses(spent), "collapse", f"Where tasks collapse, {source}.")
    show.table(spent, "answers", f"Tokens of answers, {source}.", digits={"achieved": ".4f", "n": ".0f"})
    show.table(answers.by_length(written), "answers_by_length",
               f"Accuracy in bins of equally many answers by length, {source}.", digits={"n": ".0f"})  # fmt: skip

# %% [markdown] matched
# ## Methods at the same sparsity
# Score with its standard error, all at the same achieved sparsity. ~: interpolated along the method's own
# curve, because its request led to another sparsity. Bold: the best, where its paired difference to the second best
# is significant (two-sided p < .05).

# %% matched_table
if refused and len(matched):
    show.empty(
        "The methods are not put side by side, because it would be unfair: " + refused[0].sentence
        + " With allow_unfair=true the report shows the table, marked."
    )  # fmt: skip
elif matched.empty:
    show.empty("There are no levels at which methods could be compared.")
else:
    facts_of = points.drop_duplicates(["model", "task"]).set_index(["model", "task"])[["metric", "better"]]
    rows = matched.join(facts_of, on=["model", "task"])
    sign, log = np.where(rows["better"] == "higher", 1, -1), rows["metric"].map(data.is_logged)
    rows["score"] = np.where(log, np.exp(sign * rows["quality"]), sign * rows["quality"])
    rows["error"] = np.where(log, rows["se"] * rows["score"], rows["se"])
    rows["cell"] = [
        show.measured(s, e, "~" if i else "")
        for s, e, i in zip(rows["score"], rows["error"], rows["interpolated"], strict=True)
    ]
    wide = rows.pivot_table(index=["model", "task", "method"], columns="at", values="cell", aggfunc="first", sort=False)
    wide = wide[sorted(wide.columns)].reset_index()
    scores = rows.pivot_table(index=["model", "task", "method"], columns="at", values="score", sort=False)
    scores = scores.reindex(pd.MultiIndex.from_frame(wide[["model", "task", "method"]])).reset_index(drop=True)
    ahead = {(w.model, w.task, w.at, w.best) for w in best.itertuples() if w.ahead}
    keys = list(zip(wide["model"], wide["task"], wide["method"], strict=True))
    bold = {f"{c:g}": [(m, t, c, name) in ahead for m, t, name in keys] for c in wide.columns[3:]}
    wide.columns = [c if isinstance(c, str) else f"{c:g}" for c in wide.columns]
    mark = f" UNFAIR: {unfair[0].sentence}" if unfair else ""
    caption = "Score ± standard error (none where all outcomes are the same) at each achieved sparsity, "
    show.table(wide.fillna(""), "matched", f"{caption}{source}.{mark}",
               bold=bold, order={f"{c:g}": scores[c] for c in scores})  # fmt: skip
    show.table(best.rename(columns={"at": "sparsity"}), "best",
               "The best against the second best; difference in quality, paired over samples.")  # fmt: skip

# %% heat
tasks = points["task"].nunique()
if tasks > 1 and len(sparse):
    ratio = sparse[~sparse["hollow"]].copy()
    reference = dense["score"].groupby(level=[0, 1]).first()
    base = reference.reindex(pd.MultiIndex.from_frame(ratio[["model", "task"]])).to_numpy()
    lower = ratio["better"] == "lower"
    ratio["kept"] = np.where(lower, base / ratio["score"], ratio["score"] / np.where(base > 0, base, np.nan))
    at_level = min(ratio["requested"].dropna().unique(), key=lambda s: abs(s - 0.5), default=None)
    chosen = ratio[ratio["requested"] == at_level] if at_level is not None else ratio
    shares = chosen.pivot_table(index="method", columns="task", values="kept", aggfunc="mean", sort=False)
    shares["mean"], shares["worst"] = shares.mean(axis=1), shares.min(axis=1)
    title = (
        f"share of the dense score kept at {at_level:g}" if at_level is not None else "share of the dense score kept"
    )
    with drawing("heat"):
        show.figure(figures.heat(shares, title), "heat",
                    f"{title}, mean over models; grey: untested, or dense has none; {source}.",
                    f"Heat map of methods by tasks: {title}")  # fmt: skip
    show.table(shares.reset_index(), "heat", f"{title}.")
else:
    show.empty("One task only: there is no table of methods by tasks.")

# %% safe
if safe.empty or safe["n"].isna().all():
    show.empty("No safe sparsity: " + (safe["says"].iloc[0] if len(safe) else "there are no levels") + ".")
else:
    show.says(
        "*non_inferior* is the level to rely on: up to it a loss of 0.02 or more (accuracy, or log perplexity) is "
        "ruled out at the 5% level on paired samples. *not_worse* only says that no loss was seen (the protocol of "
        "The Sparse Frontier): with few samples a loss is easily overlooked."
    )
    tested = safe[safe["n"].notna()].reset_index(drop=True)
    caption = f"Safe sparsity, n = {tested['n'].min():.0f}, {source}."
    ROWS = 40  # beyond, a map in place of a line each
    if len(tested) <= ROWS:
        with drawing("safe"):
            drawn = figures.safe_levels(tested, looks)
            show.figure(drawn, "safe", caption, "Largest safe sparsity of each method by two rules")
    tested["setting"] = tested["task"].map(over_tasks.setting_of)
    tested["name"] = tested["task"].str.partition(" ")[0]
    who = tested.groupby("setting", sort=False)["method"].agg(lambda own: ", ".join(dict.fromkeys(own)))
    for number, (_, places) in enumerate(who.groupby(who, sort=False) if len(tested) > ROWS else ()):
        own = tested[tested["setting"].isin(places.index)]
        with drawing(f"safe-{number}"):
            drawn = multiples.safe_map(own, looks)
            show.figure(drawn, f"safe-{number}", f"{caption} In a cell: the level to rely on / no loss detected.",
                        "Largest safe sparsity of each method and model on each task by two rules")  # fmt: skip
    over = over_tasks.safe_over_tasks(safe)
    if (over["tasks"] > 1).any():
        show.table(over, "safe_over_tasks", "Safe levels over the tasks of a setting (a task that fails at once "
                   "counts 0): mean, std, and the minimum with its task, by each rule. Tasks with too few samples to "
                   f"tell are left out of non_inferior; decided: how many tasks are in it, {source}.")  # fmt: skip
    show.table(safe, "safe", f"The largest sparsity that keeps the quality, {source}.", digits={"n": ".0f"})
    show.table(over_tasks.safe_minimum(safe), "safe_minimum", "Non-inferior level over models and tasks (0: fails at "
               "once), over the decided of all cells: the others were not tested or have too few samples to tell. "
               "Where all are decided, the minimum is what can be relied on.")  # fmt: skip

# %% [markdown] costs
# ## Costs
# What sparsity saves, counted on each model: FLOPs and bytes for one token, and milliseconds where a sparse kernel was
# timed. *simulated*: no kernel was timed, so that nothing is said about time.

# %% cost_table
COSTS = {
    "flops_prefill": "FLOPs, prefill",
    "flops_decode": "FLOPs, decode",
    "bytes_weights": "bytes of weights",
    "kv_bytes_per_token": "cache bytes",
    "bytes_decode": "bytes read, decode",
    "ms_prefill": "measured ms, prefill",
    "ms_decode": "measured ms, decode",
}
have = facts.first(used, list(COSTS))
mean_costs = used.groupby(data.LEVEL, dropna=False, sort=False)[have].mean().reset_index(drop=True)
with_costs = pd.concat([points, mean_costs], axis=1)  # both are in the order of the levels
shares = with_costs[["model", "task", "method", "requested", "achieved"]].copy()
dense_costs = with_costs[with_costs["method"] == "dense"].drop_duplicates(["model", "task"])
for name in have:
    base = dense_costs.set_index(["model", "task"])[name].reindex(pd.MultiIndex.from_frame(shares[["model", "task"]]))
    shares[COSTS[name]] = with_costs[name].to_numpy() / base.to_numpy()
if have:
    time = "" if "ms_prefill" in have else " Time is simulated: no kernel was timed."
    show.table(dense_costs[["model", "task", *have]].rename(columns=COSTS), "costs_dense", f"The dense models.{time}")
    show.table(shares[shares["method"] != "dense"], "costs", f"Costs as a share of the dense model's, {source}.",
               digits=dict.fromkeys(shares.columns[4:], ".3f"))  # fmt: skip
else:
    show.empty("The records hold no costs.")

# %% [markdown] frontiers
# ### Frontiers
# Who gives the most quality for a cost. Filled: on the front in half or more of 2,000 resamples of the samples;
# hollow: in 5% or more; pale: in fewer. Squares: dense models.

# %% frontier
usable = with_costs[~with_costs["hollow"]]
if usable["task"].nunique() > over_tasks.MOST:
    means = over_tasks.pooled(usable, have)
    if len(means):
        usable = means
        show.says("Costs are shown for the mean over the tasks of a setting; each task is in curves.csv.")
frames = []
for task, own in usable.groupby("task", sort=False):
    for name in have:
        on = own[own[name].notna() & (own[name] > 0)]
        if len(on) < 2 or on[name].nunique() < 2 or not over_tasks.saves(on, name):
            continue
        front = levels.front(on, name, outcomes)
        frames.append(front.assign(axis=name, cost=front[name]))
        file = show.file_name("frontier", task, name)
        with drawing(file):
            drawn = figures.frontier(front, name, COSTS[name], looks, figures.limits(own, sweep.naive))
            show.figure(drawn, file, f"{task}: quality against {COSTS[name]}, {source}.",
                        f"Quality against {COSTS[name]} with the non-dominated points, {task}")  # fmt: skip
columns = ["task", "axis", "model", "method", "achieved", "cost", "score", "se", "front", "share"]
frontier = pd.concat(frames)[columns] if frames else pd.DataFrame(columns=columns)
show.csv(frontier, "frontier.csv")
if frames:
    on_front = frontier[frontier["front"] | (frontier["share"] >= 0.05)].sort_values(["task", "axis", "cost"])
    show.table(on_front, "frontier", f"Points on the fronts, with their share of resamples, {source}.",
               digits={"cost": ",.6g", "share": ".3f"})  # fmt: skip
else:
    show.empty("No cost differs between two points: there is no frontier to draw.")

# %% [markdown] sizes
# ### Which size for a cost
# At each cost, the best quality that every model size reaches for no more with any method (interpolated along each
# method's own curve; where all of a size's curves end, its best stays). Dashed, with its 95% band: the cost at which
# two neighbouring sizes change places.

# %% iso_cost
frames = []
for task, own in usable.groupby("task", sort=False):
    for name in have:
        on = own[own[name].notna() & (own[name] > 0)]
        if len(crossings.sizes(on, name)) < 2 or not over_tasks.saves(on, name):
            continue
        crossed = crossings.crossings(on, name, outcomes)
        frames.append(crossed.assign(task=task, axis=COSTS[name]))
        file = show.file_name("iso_cost", task, name)
        with drawing(file):
            drawn = cost_figures.iso_cost(on, crossed, name, COSTS[name])
            show.figure(drawn, file, f"{task}: the best of each size against {COSTS[name]}, {source}.",
                        f"Best quality of each model size over {COSTS[name]}, {task}")  # fmt: skip
if frames:
    crossed = pd.concat(frames)[["task", "axis", "model", "larger", "cost", "above", "low", "high", "share"]]
    show.table(crossed, "crossovers", "Costs at which two neighbouring sizes change places, and which is the better "
               "above (empty: they do not, at any cost that affords both). With the 95% interval of the first one in "
               f"that direction, and the share of resamples that have one, {source}.",
               digits={"cost": ",.4g", "low": ",.4g", "high": ",.4g", "share": ".3f"})  # fmt: skip
    operations = [name for name in have if name.startswith("flops_") and over_tasks.saves(usable, name)]
    equal = pd.concat(
        [over_tasks.equal_costs(usable, name, crossings.sizes(usable, name)).assign(axis=COSTS[name])
         for name in operations]
    ) if operations else pd.DataFrame()  # fmt: skip
    if len(equal):
        show.table(equal, "equal_flops", "Large and sparse against small and dense at no more FLOPs: the best point of "
                   "the larger size that costs no more than the smaller one densely (empty: it has none; cheapest: its "
                   f"lowest cost over that cost), {source}.", digits={"cost": ",.4g"})  # fmt: skip
else:
    show.empty("One model size: there is nothing to choose between.")

# %% [markdown] time
# ### Milliseconds
# Timed on sparse kernels in turn with the same model run densely. Dashed: the speed-up that its bound (FLOPs of a
# prefill, bytes read in decoding) would allow. A tick: the sparsity from which it pays.

# %% latency
timed = crossings.speed(used)
for (model, phase), own in timed.groupby(["model", "phase"], sort=False):
    file = show.file_name("latency", model, phase)
    with drawing(file):
        drawn = cost_figures.latency(own, looks)
        show.figure(drawn, file, f"{model}, {phase}: milliseconds and speed-up, {source}.",
                    f"Milliseconds and speed-up of {phase} over achieved sparsity, {model}")  # fmt: skip
if len(timed):
    pays = timed.groupby(["model", "phase", "method"], sort=False)[["achieved", "speedup"]].apply(crossings.break_even)
    pays = pays.rename("pays_from").reset_index()
    show.table(timed.merge(pays, on=["model", "phase", "method"]), "latency", "Measured and theoretical speed-up over "
               f"dense (geometric mean over runs, lowest and highest), {source}.")  # fmt: skip
else:
    show.empty("No run was timed on a sparse kernel (kernel=auto does that).")

# %% [markdown] mechanism
# ## Where the zeros are
# Achieved sparsity layer by layer, at the requested level nearest one half.

# %% layers
at_level = min(sparse["requested"].dropna().unique(), key=lambda s: abs(s - 0.5), default=None)
model = sparse["model"].iloc[0] if len(sparse) else None
chosen = counted[(counted["model_label"] == model) & (counted["level"] == at_level)].drop_duplicates("method_label")
raw = sweep.layers(chosen["run_id"])
layers = facts.blocks(raw, dict(zip(chosen["run_id"], chosen["method_label"], strict=True))) if len(raw) else raw
if len(layers):
    profile = layers.groupby(["method", "block", "module"], sort=False)["achieved"].mean().reset_index()
    on = "; ".join(chosen["task_label"].unique())
    caption = f"Per-layer sparsity on {model} at {at_level:g} (dashed: the request), {on}, {source}."
    with drawing("layers"):
        drawn = figures.layer_profile(profile, looks, at_level)
        show.figure(drawn, "layers", caption, f"Achieved sparsity by block and module, {model}, at {at_level:g}")
    wide = profile.pivot_table(index=["method", "module"], columns="block", values="achieved", sort=False).reset_index()
    wide.columns = [c if isinstance(c, str) else f"block {c}" for c in wide.columns]
    show.table(wide, "layers", caption, digits=dict.fromkeys(wide, ".3f"))
else:
    show.empty("The records hold no per-layer sparsity.")
show.empty("Mask maps and distributions of activations are not drawn: records keep counts, not masks.")

# %% [markdown] laws
# ## Scaling laws
# Fitted where the sweep holds enough sizes; a fit whose data do not determine it prints no exponents.

# %% fits
results, reasons = facts.fits(counted)
by_length, why = length_law.fits(sweep, counted)
results, reasons = [*results, *by_length], [*reasons, *why]
show.laws(results, source)
if by_length:
    show.says(
        "The log-linear law of accuracy, for each phase by two estimators: *binomial*, the likelihood of the outcomes, "
        "and *ols*, least squares on clipped logits as in the paper. Each axis in turn was held out, where two or more "
        "of its values are left: the law was fitted without its highest value and predicts it."
    )
    show.says(*length_law.not_held(by_length))
    for one in by_length:
        if length_law.predictions(one).empty:
            continue
        file = show.file_name("heldout", one.name)
        with drawing(file):
            drawn = multiples.heldout(length_law.predictions(one), one.name)
            show.figure(drawn, file, f"{one.name}: what was held out, {source}.",
                        f"Predicted over observed accuracy on the held-out slices, {one.name}")  # fmt: skip
    if len(length_law.table(by_length)):
        show.table(length_law.table(by_length), "heldout", "What each fit predicts of the slice that was held out, "
                   f"over all tasks and by task: R2, Spearman's rho, mean absolute error, {source}.")  # fmt: skip
if not results:
    show.empty("No law is fitted. " + "; ".join(reasons) + ".")

# %% [markdown] published
# ## Published numbers beside ours
# What papers print at the same method and level. Other models, other data: compare the order, never the value.
# *first-hand*: read in the paper or its repository; *second-hand*: quoted by somebody else.

# %% published_table
compared = published.beside(sweep, points)
show.csv(compared, "published_vs_ours.csv")
reliable = compared[compared["quality"] != "unverified"]
if reliable.empty:
    show.empty("No published number stands at a method and level of this sweep.")
else:
    largest = dense_costs["model"].iloc[-1] if len(dense_costs) else points["model"].iloc[-1]
    shown = reliable[reliable["our_model"] == largest].rename(columns={"our_task": "task"})
    shown = shown.assign(
        ours=list(map(show.with_interval, shown["ours"], shown["ours_low"], shown["ours_high"])),
        theirs=[
            f"{value:g} {unit if isinstance(unit, str) else ''}".strip()
            for value, unit in zip(shown["published"], shown["unit"], strict=True)
        ],
        on=[
            ", ".join(text for text in one if isinstance(text, str))
            for one in zip(shown["their_model"], shown["their_data"], shown["setting"], strict=True)
        ],
    )
    columns = ["method", "sparsity", "pattern", "metric", "theirs", "on", "task", "ours", "place", "quality"]
    if shown["difference"].notna().any():
        columns.insert(8, "difference")
    hidden = int((compared["quality"] == "unverified").sum())
    caption = f"Published numbers (theirs, on their model and data) beside ours on {largest} (task: ours). "
    caption += f"All our models: published_vs_ours.csv. {hidden} unverified numbers are hidden."
    show.table(shown[columns], "published", caption)

# %% [markdown] checks
# ## Checks

# %% audits
failed = counted[counted["audits_failed"].notna()] if facts.first(counted, ["audits_failed"]) else counted[:0]
if len(failed):
    names = {"method_label": "method", "model_label": "model"}
    show.table(failed[["run_id", "model_label", "method_label", "level", "audits_failed"]].rename(columns=names),
               "audits", "Audits that failed.")  # fmt: skip
else:
    show.says(f"No audit failed in {len(counted)} runs.")
reference = (
    used[used["method_label"] == "dense"].groupby(["model_label", "task_label"])["score"].agg(["size", "min", "max"])
)
same = bool((reference["min"] == reference["max"]).all()) if len(reference) else False
if len(reference):
    show.says("Dense gives one score per model and task." if same else "Dense runs differ: see the list of runs.")
guards = []
for (model, task), own in outcomes.items():
    ids = [
        one
        for one in used.loc[(used["model_label"] == model) & (used["task_label"] == task), "run_id"]
        if one in own.values
    ]
    if len(ids) > 1 and len(guards) < 6:
        rate = swap_rate(own.values[ids[0]], own.values[ids[1]])
        guards.append({"model": model, "task": task, "false verdicts with swapped labels": rate, "allowed": 0.05})
if guards:
    show.table(
        pd.DataFrame(guards), "guard", "The test on data where nothing is to find: labels swapped at random 200 times."
    )
many = (
    used.groupby(data.LEVEL, dropna=False).filter(lambda level: len(level) > 1)
    if (points["seeds"] > 1).any()
    else used[:0]
)
if len(many):
    by_level = many.groupby(data.LEVEL, dropna=False)["quality"].std().groupby("method_label").mean()
    show.table(
        by_level.rename_axis("method").reset_index(name="sd over seeds"),
        "seeds",
        "Spread of quality over seeds at one level, mean over levels.",
    )
else:
    show.empty("One seed a level: the spread over seeds is not known.")
noted = counted[counted["warnings"].notna()] if facts.first(counted, ["warnings"]) else counted[:0]
for text, group in noted.groupby("warnings") if len(noted) else ():
    show.warn(f"{len(group)} runs: {text}")

# %% [markdown] methods
# ## What is what
# What the sparsity of each method counts, and how quality was measured and tested.

# %% about
show.table(facts.about_methods(sweep), "methods", "The methods of this sweep.")
measured = points.groupby("task").agg(metric=("metric", "first"), better=("better", "first"), samples=("n", "min"))
show.table(measured.reset_index(), "tasks", "The tasks and their primary metric.", digits={"samples": ".0f"})
show.says(
    "Errors and tests: two-way jackknife over seeds and samples, ten windows of running text in a row being one; "
    "perplexities are averaged and tested as mean NLL.",
    "Costs count 2 FLOPs per multiply-add of what is not zero, and the bytes of the stored format with its indices.",
    "Published numbers take no part in any test.",
)
for name, text in facts.descriptions(sweep).items():
    show.details(f"{name}: formula, what is counted, deviations from the paper", text)

# %% [markdown] provenance
# ## Where the numbers come from
# Every run that was planned. The points of the figures lead here.

# %% provenance_table
columns = [
    "run_id",
    "model_label",
    "task_label",
    "method_label",
    "level",
    "achieved",
    "seed",
    "state",
    "score",
    "score_se",
]
columns += facts.first(runs, ["seconds", "device", "dtype", "version", "attempt"])
names = {"model_label": "model", "task_label": "task", "method_label": "method", "level": "requested", "score_se": "se"}
show.table(
    runs[[*columns, "command"]].rename(columns=names), "runs", f"All planned runs, {source}.",
    digits={"achieved": ".4f", "seconds": ".1f", "seed": ".0f", "attempt": ".0f"}, link="run_id",
)  # fmt: skip
machine = [{"what": key, "values": ", ".join(map(str, sorted(runs[key].dropna().unique(), key=order)))}
           for key in facts.first(runs, ["version", "device", "dtype", "platform", "schema"])]  # fmt: skip
show.table(pd.DataFrame(machine), "provenance", "Code, hardware and libraries of the runs.")

# %% [markdown] limitations
# ## Limitations

# %% limits
said = facts.limitations(sweep, counted)
show.says(*said) if said else show.empty("No limitation follows from the records.")
