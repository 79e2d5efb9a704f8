# Channels of spatial frequencies: what observers make of pictures in octave noise, and how far that noise moves what an encoder
# predicts. Files of people's trials are no inputs that the graph waits for, as with one's own recordings.

OBSERVERS = PSYCHOPHYSICS.get("observers", {})
AREAS = PSYCHOPHYSICS.get("areas", {})
SHOWN = PSYCHOPHYSICS.get("stimuli", {})


def shown_folder():
    return stimuli_folder(SHOWN["study"]) if "study" in SHOWN else SHOWN["folder"]


def masking_options(**more):
    keys = ("images", "size", "contrast", "mean_intensity", "noise_sds", "bands")
    return options(**{**{k: PSYCHOPHYSICS.get(k) for k in keys}, **more})


rule channel_trials:
    input:
        card=lambda w: f"{OUT}/models/{OBSERVERS[w.observer]['model']}.json",
        stimuli=lambda w: stimuli_source(SHOWN["study"]) if "study" in SHOWN else [],
    output:
        trials=OUT + "/psychophysics/trials/{observer}.nc",
    log:
        OUT + "/logs/channel_trials/{observer}.log",
    benchmark:
        OUT + "/benchmarks/channel_trials/{observer}.tsv"
    wildcard_constraints:
        observer="|".join(OBSERVERS) or "none",
    params:
        # `model_options` gives the seed too, that of conditions and noise.
        model=lambda w: model_options(OBSERVERS[w.observer]["model"]),
        folder=lambda w: shown_folder(),
        options=lambda w: masking_options(
            by=OBSERVERS[w.observer]["by"],
            classes=OBSERVERS[w.observer].get("classes"),
            title=OBSERVERS[w.observer]["title"],
        ),
    threads: resource("channel_trials", "threads")
    resources:
        **needs("channel_trials"),
    shell:
        "brainalign channel-trials {params.model} --stimuli {params.folder} --out {output.trials}"
        " {params.options} --batch-size {config[features][batch_size]}"
        " --device {config[features][device]} 2> {log}"


rule channel_areas:
    input:
        encoded=lambda w: f"{OUT}/encoding/{AREAS['study']}/{AREAS['subject']}/{AREAS['model']}",
        stimuli=lambda w: stimuli_source(SHOWN["study"]) if "study" in SHOWN else [],
    output:
        areas=OUT + "/psychophysics/areas.nc",
    log:
        OUT + "/logs/channel_areas.log",
    benchmark:
        OUT + "/benchmarks/channel_areas.tsv"
    params:
        model=lambda w: model_options(AREAS["model"]),
        folder=lambda w: shown_folder(),
        options=lambda w: masking_options(
            rois=AREAS.get("rois"),
            title=MODELS[AREAS["model"]]["title"],
            images=AREAS.get("images", PSYCHOPHYSICS.get("images")),
        ),
    threads: resource("channel_areas", "threads")
    resources:
        **needs("channel_areas"),
    shell:
        "brainalign channel-areas {params.model} --encoded {input.encoded} --stimuli {params.folder}"
        " --out {output.areas} {params.options} --batch-size {config[features][batch_size]}"
        " --device {config[features][device]} 2> {log}"


rule channels_section:
    input:
        trials=[f"{OUT}/psychophysics/trials/{observer}.nc" for observer in OBSERVERS],
        areas=[f"{OUT}/psychophysics/areas.nc"] if AREAS else [],
        stimuli=lambda w: stimuli_source(SHOWN["study"]) if "study" in SHOWN else [],
    output:
        section=directory(OUT + "/sections/channels"),
    log:
        OUT + "/logs/channels_section.log",
    benchmark:
        OUT + "/benchmarks/channels_section.tsv"
    params:
        folder=lambda w: shown_folder(),
        areas=lambda w, input: options(areas=input.areas or None),
        options=lambda w: options(
            **{k: PSYCHOPHYSICS.get(k) for k in ("size", "contrast", "mean_intensity", "guess", "bootstraps")},
            people=PSYCHOPHYSICS["people"] or None,
            published_people=PSYCHOPHYSICS["published_people"],
            seed=config["seed"],
        ),
    threads: resource("evaluate", "threads")
    resources:
        **needs("evaluate"),
    shell:
        "brainalign channel-section {input.trials} {params.areas} --stimuli {params.folder}"
        " --out {output.section} {params.options} 2> {log}"
