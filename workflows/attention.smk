# The sweep of attention mechanisms: the small vision transformer is trained once per mechanism and seed on an equal budget; its
# features and encoding models are those of every model; a section compares the networks.

SWEEP_CONFIG = config.get("attention_sweep", {})


def sweep_keys(*keys):
    """Properties of the sweep's models that a command needs."""
    return {name: {k: m[k] for k in keys if m[k] is not None} for name, m in SWEEP.items()}


def sweep_study(role):
    study = SWEEP_CONFIG.get(role)
    return study if study and study_available(study) else None


rule attention_scenes:
    output:
        scenes=directory(OUT + "/attention/scenes/{seed}"),
    log:
        OUT + "/logs/attention_scenes/{seed}.log",
    benchmark:
        OUT + "/benchmarks/attention_scenes/{seed}.tsv"
    wildcard_constraints:
        seed="[0-9]+",
    params:
        scenes=SWEEP_CONFIG.get("scenes"),
    resources:
        **needs("attention_train"),
    shell:
        "python -m brainalign.small_models.clip --render-only --scenes-folder {output.scenes}"
        " --scenes {params.scenes} --seed {wildcards.seed} 2> {log}"


rule attention_train:
    input:
        scenes=OUT + "/attention/scenes/{seed}",
    output:
        model=directory(OUT + "/attention/models/{mechanism}-{seed}"),
    log:
        OUT + "/logs/attention_train/{mechanism}-{seed}.log",
    benchmark:
        OUT + "/benchmarks/attention_train/{mechanism}-{seed}.tsv"
    wildcard_constraints:
        mechanism="|".join(SWEEP_CONFIG.get("mechanisms", [])) or "none",
        seed="[0-9]+",
    params:
        # Training goes on from here after an interruption.
        checkpoint=OUT + "/attention/checkpoints/{mechanism}-{seed}",
        options=lambda w: options(
            attention=SWEEP_CONFIG["mechanisms"][w.mechanism],
            scenes=SWEEP_CONFIG["scenes"],
            steps=SWEEP_CONFIG["steps"],
            batch_size=SWEEP_CONFIG["batch_size"],
            learning_rate=SWEEP_CONFIG["learning_rate"],
            measure=SWEEP_CONFIG["measure"],
        ),
        device="cpu" if config["features"]["device"] == "auto" else config["features"]["device"],
    threads: resource("attention_train", "threads")
    resources:
        **needs("attention_train"),
    shell:
        "python -m brainalign.small_models.clip --tower vit --seed {wildcards.seed}"
        " --scenes-folder {input.scenes} --checkpoint {params.checkpoint} --out {output.model}"
        " --threads {threads} --device {params.device} {params.options} 2> {log}"


rule attention_profile:
    input:
        models=sorted({m["folder"] for m in SWEEP.values()}),
        stimuli=lambda w: stimuli_source(SWEEP_CONFIG["measured_on"]),
    output:
        OUT + "/attention/profiles.json",
    log:
        OUT + "/logs/attention_profile.log",
    benchmark:
        OUT + "/benchmarks/attention_profile.tsv"
    params:
        folder=lambda w: stimuli_folder(SWEEP_CONFIG["measured_on"]),
        models=lambda w: options(
            models=sweep_keys("name", "seed", "trained_attention", "attention")
        ),
    # One thread measures times: give it all cores of the machine (`resources`) where they matter.
    threads: resource("attention_profile", "threads")
    resources:
        **needs("attention_profile"),
    shell:
        "brainalign profile {params.models} --stimuli {params.folder} --out {output} 2> {log}"


def sweep_generator():
    """What the responses of the encoding study are simulated from."""
    study = STUDIES.get(SWEEP_CONFIG.get("encoding"), {})
    if study.get("loader") != "simulated":
        return None
    return MODELS[study["parameters"]["model"]]["title"]


def sweep_inputs(wildcards):
    inputs = {"profiles": f"{OUT}/attention/profiles.json"}
    if study := sweep_study("rsa"):
        inputs["rsa"] = f"{OUT}/studies/{study}/data"
        inputs["features"] = [f"{OUT}/features/{study}/{m}.json" for m in SWEEP]
    if study := sweep_study("encoding"):
        inputs["encoded"] = [
            f"{OUT}/encoding/{study}/{s}/{m}" for s in STUDIES[study]["subjects"] for m in SWEEP
        ]
    return inputs


rule attention_section:
    input:
        unpack(sweep_inputs),
    output:
        section=directory(OUT + "/sections/attention"),
    log:
        OUT + "/logs/attention_section.log",
    benchmark:
        OUT + "/benchmarks/attention_section.tsv"
    params:
        data=lambda w, input: options(
            rsa=input.get("rsa") or None,
            features=input.get("features") or None,
            encoded=input.get("encoded") or None,
        ),
        options=lambda w: options(
            models=sweep_keys("kind", "mechanism", "seed"),
            mechanisms=SWEEP_CONFIG["mechanisms"],
            reference=SWEEP_CONFIG["reference"],
            layer=SWEEP_CONFIG["layer"],
            budget={k: SWEEP_CONFIG[k] for k in ("scenes", "steps", "batch_size", "learning_rate")},
            generator=sweep_generator(),
            titles={r: STUDIES[SWEEP_CONFIG[r]]["title"] for r in ("rsa", "encoding") if r in SWEEP_CONFIG},
            bootstraps=config["evaluation"]["bootstraps"],
            seed=config["seed"],
        ),
    threads: resource("evaluate", "threads")
    resources:
        **needs("evaluate"),
    shell:
        "brainalign attention-sweep --profiles {input.profiles} --out {output.section}"
        " {params.data} {params.options} 2> {log}"
