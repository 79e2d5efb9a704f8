# Sections of the report: one per study and analysis.


ANALYSES = {
    "encoding": "encoding models",
    "rsa": "representational similarity",
    "classification": "classification",
    "parametric": "category and template models",
}


def section_title(study, analysis):
    title = STUDIES[study]["title"]
    return f"{title}: {ANALYSES[analysis]}" if len(STUDIES[study]["analyses"]) > 1 else title


def evaluation_inputs(wildcards):
    study = STUDIES[wildcards.study]
    inputs = {"data": f"{OUT}/studies/{wildcards.study}/data"}
    if wildcards.analysis in ("encoding", "rsa"):
        models = models_of(wildcards.study)
        inputs["stimuli"] = stimuli_source(wildcards.study)
        inputs["cards"] = [f"{OUT}/models/{m}.json" for m in models]
        if wildcards.analysis == "encoding":
            inputs["encoded"] = [
                f"{OUT}/encoding/{wildcards.study}/{s}/{m}"
                for s in study["subjects"]
                for m in encoded_models_of(wildcards.study)
            ]
        else:
            inputs["features"] = [f"{OUT}/features/{wildcards.study}/{m}.json" for m in models]
    return inputs


rule evaluate:
    input:
        unpack(evaluation_inputs),
    output:
        section=directory(OUT + "/sections/{study}-{analysis}"),
    log:
        OUT + "/logs/evaluate/{study}-{analysis}.log",
    benchmark:
        OUT + "/benchmarks/evaluate/{study}-{analysis}.tsv"
    params:
        stimuli=lambda w: options(stimuli=stimuli_folder(w.study))
        if w.analysis in ("encoding", "rsa")
        else "",
        encoded=lambda w, input: options(encoded=input.get("encoded") or None),
        features=lambda w, input: options(features=input.get("features") or None),
        options=lambda w: options(
            title=section_title(w.study, w.analysis),
            models={
                **{m: MODELS[m]["title"] for m in STUDIES[w.study]["models"]},
                **{m: joint["title"] for m, joint in JOINT.items() if w.analysis == "encoding"},
            },
            baselines=[m for m in STUDIES[w.study]["models"] if MODELS[m]["baseline"]] or None,
            seed=config["seed"],
            fdr=config["evaluation"]["fdr"],
            bootstraps=config["evaluation"]["bootstraps"],
        ),
    threads: resource("evaluate", "threads")
    resources:
        **needs("evaluate"),
    shell:
        "brainalign evaluate {wildcards.analysis} --id {wildcards.study}-{wildcards.analysis}"
        " --data {input.data} --out {output.section} {params.stimuli} {params.encoded}"
        " {params.features} {params.options} 2> {log}"
