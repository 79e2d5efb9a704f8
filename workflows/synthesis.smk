# Images that a region would prefer: guided by an encoder of one half of the images, judged by one of the other half, in comparison
# with the best natural images.


rule encode_half:
    input:
        **encode_inputs(),
    output:
        encoded=directory(OUT + "/encoding-halves/{study}/{subject}/{model}/{half}"),
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
    return lambda w: f"{OUT}/encoding-halves/{SYNTHESIS['study']}/{w.subject}/{SYNTHESIS[role]}/{half}"


rule dive:
    input:
        encoded=half_encoded("model", 1),
    output:
        images=directory(OUT + "/synthesis/images/{subject}/{target}"),
    log:
        OUT + "/logs/dive/{subject}-{target}.log",
    benchmark:
        OUT + "/benchmarks/dive/{subject}-{target}.tsv"
    params:
        # Every finished seed lies here: an interrupted run goes on.
        checkpoint=OUT + "/synthesis/checkpoints/{subject}/{target}",
        options=lambda w: options(
            target={"name": w.target, **{k: v for k, v in TARGETS[w.target].items() if k != "prefers"}},
            seed=config["seed"],
            **{
                k: SYNTHESIS.get(k)
                for k in ("generator", "scale", "sag", "seeds", "checkpointing", "vae_slicing", "ascent")
            },
            cut=not SYNTHESIS["through_unet"],
        ),
    threads: resource("dive", "threads")
    resources:
        **needs("dive"),
    shell:
        "brainalign dive --encoded {input.encoded} --out {output.images}"
        " --checkpoint {params.checkpoint} {params.options}"
        # How many at once and where: in no params, so that a change makes no image again.
        " --batch-size {config[synthesis][batch_size]} --device {config[features][device]} 2> {log}"


rule judge:
    input:
        images=OUT + "/synthesis/images/{subject}/{target}",
        guide=half_encoded("model", 1),
        judge=half_encoded("judge", 2),
        data=lambda w: f"{OUT}/studies/{SYNTHESIS['study']}/data",
        stimuli=lambda w: stimuli_source(SYNTHESIS["study"]),
        natural=lambda w: f"{OUT}/features/{SYNTHESIS['study']}/{SYNTHESIS['judge']}.json",
        classifier=lambda w: (
            f"{OUT}/models/{SYNTHESIS['classifier']}.json" if "classifier" in SYNTHESIS else []
        ),
    output:
        judged=directory(OUT + "/synthesis/judged/{subject}/{target}"),
    log:
        OUT + "/logs/judge/{subject}-{target}.log",
    benchmark:
        OUT + "/benchmarks/judge/{subject}-{target}.tsv"
    params:
        folder=lambda w: stimuli_folder(SYNTHESIS["study"]),
        options=lambda w: options(
            keep=SYNTHESIS["keep"],
            n_natural=SYNTHESIS["n_natural"],
            prefers=TARGETS[w.target].get("prefers"),
            classifier=model_settings(SYNTHESIS["classifier"]) if "classifier" in SYNTHESIS else None,
            labels=SYNTHESIS["labels"] if "classifier" in SYNTHESIS else None,
            seed=config["seed"],
        ),
    threads: resource("judge", "threads")
    resources:
        **needs("judge"),
    shell:
        "brainalign judge --images {input.images} --guide {input.guide} --judge {input.judge}"
        " --natural {input.natural} --stimuli {params.folder} --out {output.judged} {params.options}"
        " --device {config[features][device]} 2> {log}"


rule synthesis_section:
    input:
        judged=[
            f"{OUT}/synthesis/judged/{subject}/{target}"
            for subject in SYNTHESIS.get("subjects", [])
            for target in TARGETS
        ],
    output:
        section=directory(OUT + "/sections/synthesis"),
    log:
        OUT + "/logs/synthesis_section.log",
    benchmark:
        OUT + "/benchmarks/synthesis_section.tsv"
    params:
        options=options(seed=config["seed"], bootstraps=config["evaluation"]["bootstraps"]),
    threads: resource("evaluate", "threads")
    resources:
        **needs("evaluate"),
    shell:
        "brainalign synthesis-section {input.judged} --out {output.section} {params.options} 2> {log}"
