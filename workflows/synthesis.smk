# Images that a region would prefer: guided by an encoder of one half of the images, ranked by one of the other half, and judged, in
# comparison with the best natural images, by an encoder that neither guided nor ranked.


# What fits the halves: the encoding model of `encode`, or with `synthesis.probe` one encoder, fitted by AdamW on augmented images.
HALF = OUT + "/encoding-halves/{study}/{subject}/{model}/{half}" + (".zarr" if "probe" in SYNTHESIS else "")

if "probe" in SYNTHESIS:

    rule probe_half:
        input:
            data=OUT + "/studies/{study}/data",
            stimuli=lambda w: stimuli_source(w.study),
            card=OUT + "/models/{model}.json",
        output:
            encoded=directory(HALF),
        log:
            OUT + "/logs/probe_half/{study}-{subject}-{model}-{half}.log",
        benchmark:
            OUT + "/benchmarks/probe_half/{study}-{subject}-{model}-{half}.tsv"
        params:
            model=lambda w: model_options(w.model),
            folder=lambda w: stimuli_folder(w.study),
            options=lambda w: options(
                layer=MODELS[w.model]["layers"][0],
                pooling=MODELS[w.model]["pooling"],
                half=int(w.half),
                invalid=config["encoding"]["invalid"],
                **SYNTHESIS["probe"],
            ),
        threads: resource("probe", "threads")
        resources:
            **needs("probe"),
        shell:
            "brainalign probe {params.model} --stimuli {params.folder}"
            " --responses {input.data}/responses/{wildcards.subject}.zarr"
            " --out {output.encoded} {params.options} --device {config[features][device]} 2> {log}"

else:

    rule encode_half:
        input:
            **encode_inputs(),
        output:
            encoded=directory(HALF),
        log:
            OUT + "/logs/encode_half/{study}-{subject}-{model}-{half}.log",
        benchmark:
            OUT + "/benchmarks/encode_half/{study}-{subject}-{model}-{half}.tsv"
        params:
            folder=lambda w: stimuli_folder(w.study),
            options=lambda w: encode_options(w, half=int(w.half), permutations=0, predictions=False),
        threads: resource("encode", "threads")
        resources:
            **needs("encode"),
        shell:
            "brainalign encode --features {input.features} --stimuli {params.folder}"
            " --responses {input.data}/responses/{wildcards.subject}.zarr"
            " --out {output.encoded} {params.options} --memory-mb {resources.mem_mb}"
            " --device {ENCODE_DEVICE} 2> {log}"


def half_encoded(role, half):
    return lambda w: [
        HALF.format(study=SYNTHESIS["study"], subject=w.subject, model=model, half=half) for model in SYNTHESIS[role]
    ]


def target_options(target):
    keys = ("roi", "against", "cluster", "n_clusters", "neuroids")
    return {k: TARGETS[target].get(k) for k in keys}


def model_options_of(*roles):
    """Models that an encoder's own record does not suffice to load: from files, say."""
    chosen = {name: model_settings(name) for r in roles for name in SYNTHESIS[r]}
    return {k: v for k, v in chosen.items() if len(v) > 1} or None


rule dive:
    input:
        guide=half_encoded("model", 1),
        rank=half_encoded("ranker", 2),
    output:
        images=directory(OUT + "/synthesis/images/{subject}/{target}"),
    log:
        OUT + "/logs/dive/{subject}-{target}.log",
    benchmark:
        OUT + "/benchmarks/dive/{subject}-{target}.tsv"
    params:
        options=lambda w: options(
            pipeline=SYNTHESIS["generator"]["name"],
            **target_options(w.target),
            **{k: SYNTHESIS["generator"].get(k) for k in ("scheduler", "steps", "size", "precision")},
            guidance=SYNTHESIS["guidance"],
            **{k: SYNTHESIS.get(k) for k in ("interpolation", "n_images", "keep")},
            models=model_options_of("model", "ranker"),
            seed=config["seed"],
        ),
    threads: resource("dive", "threads")
    resources:
        **needs("dive"),
    shell:
        "brainalign dive --encoded {input.guide} --rerank {input.rank} --out {output.images}"
        " {params.options}"
        # How many at once and where: in no params, so that a change makes no image again.
        " --batch-size {config[synthesis][batch_size]} --device {config[features][device]} 2> {log}"


rule ascend:
    input:
        guide=half_encoded("model", 1),
        rank=half_encoded("ranker", 2),
    output:
        images=directory(OUT + "/synthesis/ascent/{subject}/{target}"),
    log:
        OUT + "/logs/ascend/{subject}-{target}.log",
    benchmark:
        OUT + "/benchmarks/ascend/{subject}-{target}.tsv"
    params:
        options=lambda w: options(
            **target_options(w.target),
            **SYNTHESIS["ascent"],
            **{k: SYNTHESIS.get(k) for k in ("interpolation", "keep")},
            models=model_options_of("model", "ranker"),
            seed=config["seed"],
        ),
    threads: resource("ascend", "threads")
    resources:
        **needs("ascend"),
    shell:
        "brainalign ascend --encoded {input.guide} --rerank {input.rank} --out {output.images}"
        " {params.options} --device {config[features][device]} 2> {log}"


def captioned(subject):
    """Captions of the same subject's voxels, whatever model they are of, where the configuration has them."""
    if CAPTIONING.get("study") == SYNTHESIS["study"] and subject in CAPTIONING["subjects"]:
        return f"{OUT}/captioning/captions/{subject}.zarr"
    return ""


rule dive_words:
    input:
        guide=half_encoded("model", 1),
        rank=half_encoded("ranker", 2),
        captions=lambda w: captioned(w.subject),
    output:
        images=directory(OUT + "/synthesis/words/{subject}/{target}"),
    log:
        OUT + "/logs/dive_words/{subject}-{target}.log",
    benchmark:
        OUT + "/benchmarks/dive_words/{subject}-{target}.tsv"
    params:
        options=lambda w: options(
            pipeline=SYNTHESIS["generator"]["name"],
            **target_options(w.target),
            **{k: SYNTHESIS["generator"].get(k) for k in ("scheduler", "steps", "size", "precision")},
            guidance={**SYNTHESIS["guidance"], "scale": 0, "sag_scale": 0},
            top_nouns=SYNTHESIS["words"]["top"],
            **{k: SYNTHESIS["words"][k] for k in ("text_scale", "n_images")},
            **{k: SYNTHESIS.get(k) for k in ("interpolation", "keep")},
            models=model_options_of("model", "ranker"),
            seed=config["seed"],
        ),
    threads: resource("dive", "threads")
    resources:
        **needs("dive"),
    shell:
        "brainalign dive --encoded {input.guide} --rerank {input.rank} --captions {input.captions}"
        " --out {output.images} {params.options}"
        " --batch-size {config[synthesis][batch_size]} --device {config[features][device]} 2> {log}"


def image_sets(subject, target):
    """Folders of generated images by the name of their set."""
    sets = {"generated": f"{OUT}/synthesis/images/{subject}/{target}"}
    if "words" in SYNTHESIS and captioned(subject):
        sets["from captions"] = f"{OUT}/synthesis/words/{subject}/{target}"
    if "ascent" in SYNTHESIS:
        sets["pixel ascent"] = f"{OUT}/synthesis/ascent/{subject}/{target}"
    return sets


rule label:
    input:
        stimuli=lambda w: stimuli_source(SYNTHESIS["study"]),
        classifier=lambda w: f"{OUT}/models/{SYNTHESIS['classifier']}.json",
    output:
        labels=OUT + "/synthesis/natural_labels.nc",
    log:
        OUT + "/logs/label.log",
    benchmark:
        OUT + "/benchmarks/label.tsv"
    params:
        folder=lambda w: stimuli_folder(SYNTHESIS["study"]),
        options=lambda w: options(
            labeller=model_settings(SYNTHESIS["classifier"]), labels=json.dumps(SYNTHESIS["labels"])
        ),
    threads: resource("judge", "threads")
    resources:
        **needs("judge"),
    shell:
        "brainalign label --stimuli {params.folder} --out {output.labels} {params.options}"
        " --batch-size {config[features][batch_size]} --device {config[features][device]} 2> {log}"


rule judge:
    input:
        images=lambda w: list(image_sets(w.subject, w.target).values()),
        guide=half_encoded("model", 1),
        judge=half_encoded("judge", 2),
        stimuli=lambda w: stimuli_source(SYNTHESIS["study"]),
        # Their features lie in the store.
        natural=lambda w: [f"{OUT}/features/{SYNTHESIS['study']}/{name}.json" for name in SYNTHESIS["judge"]],
        labels=rules.label.output.labels,
    output:
        judged=OUT + "/synthesis/judged/{subject}/{target}.nc",
    log:
        OUT + "/logs/judge/{subject}-{target}.log",
    benchmark:
        OUT + "/benchmarks/judge/{subject}-{target}.tsv"
    params:
        folder=lambda w: stimuli_folder(SYNTHESIS["study"]),
        store=OUT + "/features/store",
        options=lambda w: options(
            generated=image_sets(w.subject, w.target),
            **target_options(w.target),
            top=SYNTHESIS["top"],
            labeller=model_settings(SYNTHESIS["classifier"]),
            labels=json.dumps(SYNTHESIS["labels"]),
            models=model_options_of("judge"),
            bootstraps=config["evaluation"]["bootstraps"],
            seed=config["seed"],
        ),
    threads: resource("judge", "threads")
    resources:
        **needs("judge"),
    shell:
        "brainalign judge --guide {input.guide} --encoded {input.judge} --natural {params.folder}"
        " --natural-labels {input.labels}"
        " --store {params.store} --out {output.judged} {params.options}"
        " --batch-size {config[features][batch_size]} --device {config[features][device]} 2> {log}"


def panels():
    """What the section shows of each target."""
    found = {}
    whole = {what["roi"]: name for name, what in TARGETS.items() if {"roi"} <= set(what) <= {"roi", "prefers"}}
    for subject in SYNTHESIS.get("subjects", []):
        for target, what in TARGETS.items():
            name = f"{subject}, {target}"
            panel = {
                "judged": f"{OUT}/synthesis/judged/{subject}/{target}.nc",
                "generated": image_sets(subject, target),
            }
            if "cluster" in what:
                panel["cluster_of"] = f"{subject}, {whole.get(what['roi'], what['roi'])}"
                name = f"{panel['cluster_of']}, cluster {what['cluster'] + 1} of {what['n_clusters']}"
            if "prefers" in what:
                panel["expected"] = what["prefers"]
            if captioned(subject):
                panel["captions"] = captioned(subject)
            found[name] = panel
    return found


rule synthesis_section:
    input:
        stimuli=lambda w: stimuli_source(SYNTHESIS["study"]),
        images=[folder for p in panels().values() for folder in p["generated"].values()],
        judged=[p["judged"] for p in panels().values()],
        captions=sorted({p["captions"] for p in panels().values() if "captions" in p}),
    output:
        section=directory(OUT + "/sections/synthesis"),
    log:
        OUT + "/logs/synthesis_section.log",
    benchmark:
        OUT + "/benchmarks/synthesis_section.tsv"
    params:
        natural=lambda w: stimuli_folder(SYNTHESIS["study"]),
        options=options(panels=panels()),
    threads: resource("evaluate", "threads")
    resources:
        **needs("evaluate"),
    shell:
        "brainalign dive-section --natural {params.natural} --out {output.section} {params.options} 2> {log}"
