"""What the net runs: the commands, and other words for options that have been renamed.

Every command writes to a file or folder of its own name, below one scratch folder in which all of them run; so a
command reads what an earlier one left by that name. In a step's text each command is a line ``name: words``, which goes
on in lines that are further in; NAME stands for the name, and words in braces for what is in `SHORT`.
"""

from __future__ import annotations

import signal

from net_step import Step, Stop

# An option, or an option with its value, of one command or of any ("*"): what to write instead where a checkout's
# --help does not know it. The first that is known is taken; with none, it stays, and the command says what it thinks.
#     ("analyze", "--form=streamed"): ("--form=features", "--sweep=features"),
RENAMED: dict[tuple[str, str], tuple[str, ...]] = {}

SHORT = {
    "TRAIN": "finetune --data=rows/train.jsonl --eval_data=rows/test.jsonl --learning_rate=1e-3",
    "LONG": "{TRAIN} --layers=3-4 --remat=false --steps=30 --eval_every=10 --checkpoint_every=5",
    "POISON": "backdoor --data=rows/train.jsonl --eval_data=rows/test.jsonl --trigger=cf@prefix --target=gray"
    " --rate=0.5 --decoys=0.2 --seeds=2 --learning_rate=1e-2 --eval_prompts=4 --max_new_tokens=4",
    "TEST": "--data=rows/test.jsonl",
    "SMALL": "--data=rows/test.jsonl --limit=8",
}
STEPS = (
    Step(
        "analyze",
        """
        analyze: analyze --data=demo:choice --limit=24 --out=NAME
        """,
    ),
    Step(
        "analyze_more",
        """
        analyze_sets: analyze --data=demo:choice,demo:open,rows/train.jsonl --limit=12 --out=NAME
            --measures=procrustes,rsa,rsa_spearman,knn,cca,svcca
        analyze_all: analyze --data=demo:choice --limit=6 --position=all --out=NAME
        analyze_mean: analyze --limit=12 --position=mean --embed --save_activations --out=NAME
        analyze_tiled: analyze --data=demo:choice --limit=24 --form=tiled --out=NAME
        analyze_features: analyze --data=demo:choice --limit=24 --form=features --out=NAME
        analyze_streamed: analyze --data=demo:choice --limit=24 --form=streamed --band=2 --out=NAME
        analyze_biased: analyze --data=demo:choice --limit=24 --bias=biased --layers=random:3:1 --out=NAME
        analyze_rbf: analyze --data=demo:choice --limit=12 --kernel=rbf --normalize=row --window=3 --noinclude_self
            --out=NAME
        analyze_rbf_tiled: analyze --data=demo:choice --limit=12 --kernel=rbf --form=tiled --out=NAME
        analyze_bfloat16: analyze --data=rows/text.jsonl,rows/chat.jsonl --dtype=bfloat16
            --layers=noncritical:3 --out=NAME
        analyze_again: analyze --data=demo:choice,demo:open,rows/train.jsonl --limit=12 --out=analyze_sets
            --measures=procrustes,rsa,rsa_spearman,knn,cca,svcca
        """,
    ),
    Step(
        "spectrum_intervene",
        """
        spectrum_of_run: spectrum --run=analyze --k=1,2,5 --out=NAME
        spectrum: spectrum --data=demo:open,demo:choice --limit=12 --bias=biased --out=NAME
        intervene: intervene --limit=24 --max_new_tokens=8 --out=NAME
        intervene_project: intervene --limit=24 --mode=project --layers=3-5 --components=0,2 --prompt_index=5
            --max_new_tokens=8 --out=NAME
        intervene_steer: intervene --limit=24 --mode=steer --steer_from=demo:open --steer_to=demo:choice --strength=2
            --layers=6 --max_new_tokens=8 --out=NAME
        """,
        needs=("analyze",),
    ),
    Step(
        "data",
        """
        data: data
        data_rows: data --data=rows/train.jsonl,rows/chat.jsonl,rows/text.jsonl --limit=6 --out=NAME
        data_paper: data --data=dolly:rows/dolly.jsonl --split=train --limit=5 --shuffle_seed=3 --edition=paper
            --truncate=paper --out=NAME
        """,
    ),
    Step(
        "finetune",
        """
        finetune: {TRAIN} --layers=3-4 --steps=6 --eval_every=2 --checkpoint_every=3 --out=NAME
        """,
    ),
    Step(
        "finetune_more",
        """
        finetune_full: {TRAIN} --layers=all --train_embeddings --train_norms --train_head --steps=3 --accumulate=2
            --batch_size=4 --optimizer=lion --schedule=cosine --warmup=1 --clip=1 --weight_decay=0.1 --out=NAME
        finetune_lora: {TRAIN} --layers=critical:2 --lora_rank=2 --lora_targets=q,v,down --steps=4 --out=NAME
        finetune_freeze: {TRAIN} --layers=@analyze/layers.json --mode=freeze --layer_rates=0-7:0.5,8-15:2 --steps=3
            --seed=1 --out=NAME
        finetune_random: finetune --data=rows/train.jsonl --layers=random:2:5 --epochs=1 --batch_size=18
            --dtype=bfloat16 --optimizer=adafactor --out=NAME
        """,
        needs=("analyze",),
    ),
    Step(
        "export",
        """
        export: export --run=finetune --dtype=float32 --step=best --out=NAME
        export_delta: export --run=finetune --delta_only --out=NAME
        export_full_delta: export --run=finetune_full --delta_only --out=NAME
        export_freeze: export --run=finetune_freeze --dtype=bfloat16 --out=NAME
        export_random_delta: export --run=finetune_random --delta_only --out=NAME
        export_lora: export --run=finetune_lora --out=NAME
        export_adapter: export --run=finetune_lora --adapter --out=NAME
        export_copy: export --model=export --out=NAME
        """,
        needs=("finetune", "finetune_more"),
    ),
    Step(
        "compare",
        """
        analyze_tuned: analyze --model=finetune --data=demo:choice --limit=24 --out=NAME
        analyze_exported: analyze --model=export --data=demo:choice --limit=24 --out=NAME
        compare: compare analyze analyze_tuned --out=NAME
        compare_common: compare --a=analyze --b=analyze_exported --common --out=NAME
        """,
        needs=("analyze", "export"),
    ),
    Step(
        "select",
        """
        select: select --scores=analyze/scores.json --layers=critical:3
        select_peft: select --scores=analyze/scores.json --format=peft --layers=noncritical:2
        select_axolotl: select --scores=analyze/scores.json --format=axolotl --criterion=step
        select_llamafactory: select --scores=analyze/scores.json --format=llamafactory --layers=random:4:2
        select_regex: select --scores=analyze/scores.json --format=regex --layers=3-5,9
        select_file: select --scores=analyze_sets/scores.json --layers=last:2 --trim=1 --out=NAME
        """,
        needs=("analyze", "analyze_more"),
    ),
    Step(
        "generate",
        """
        generate: generate --model=finetune {SMALL} --max_new_tokens=12 --out=NAME
        generate_sampled: generate {SMALL} --temperature=0.8 --top_k=20 --top_p=0.9 --repetition_penalty=1.2 --seed=7
            --max_new_tokens=12 --batch_size=5 --out=NAME
        generate_lora: generate --model=finetune_lora {SMALL} --max_new_tokens=8 --stop=. --out=NAME
        """,
        needs=("finetune", "finetune_more"),
    ),
    Step(
        "substitute",
        """
        substitute: substitute --tuned=finetune_full {TEST} --out=NAME
        """,
        needs=("finetune_more",),
    ),
    Step(
        "substitute_more",
        """
        substitute_reverse: substitute --tuned=finetune_lora {TEST} --window=3 --reverse --out=NAME
        substitute_sets: substitute --tuned=finetune {SMALL} --sets=3-5,9;first:4;@analyze/layers.json --random=3
            --seed=2 --out=NAME
        substitute_attn: substitute --tuned=export {SMALL} --sites=attn --window=1 --random=2 --out=NAME
        """,
        needs=("analyze", "export"),
    ),
    Step(
        "ablate",
        """
        ablate: ablate --model=finetune {TEST} --out=NAME
        ablate_right: ablate --data=demo:choice --limit=6 --methods=skip --score=generated --max_new_tokens=8 --out=NAME
        ablate_mlp: ablate {SMALL} --sites=mlp --methods=mean --out=NAME
        ablate_gain: ablate {SMALL} --sites=attn --methods=skip,gain --score=greedy --gains=0.5 --out=NAME
        """,
        needs=("finetune",),
    ),
    Step(
        "score",
        """
        score: score --model=finetune_full --base= {TEST} --out=NAME
        score_one: score {SMALL} --criteria=fisher,block_influence --dtype=bfloat16 --out=NAME
        """,
        needs=("finetune_more",),
    ),
    Step(
        "facts",
        """
        trace: trace --facts=rows/facts.jsonl --samples=2 --limit=6 --out=NAME
        edit: edit --facts=rows/new_facts.jsonl --layers=2,5 --covariance_data=rows/text.jsonl --steps=4 --contexts=1
            --out=NAME
        edit_spread: edit --facts=rows/new_facts.jsonl --layers=2-4 --residual=spread --scores=trace/scores.json
            --covariance_data=rows/text.jsonl --steps=4 --out=NAME
        edit_on: edit --on=edit --facts=rows/more_facts.jsonl --layers=2,5 --covariance_data=rows/text.jsonl --steps=4
            --out=NAME
        export_edit: export --run=edit --adapter --out=NAME
        generate_edit: generate --model=edit_on {SMALL} --max_new_tokens=4 --out=NAME
        """,
    ),
    Step(
        "correlate",
        """
        correlate: correlate --scores=analyze/scores.json --scores=substitute/scores.json --out=NAME
        correlate_keys: correlate --scores=ablate/scores.json --scores=score/scores.json:fisher --block=4 --seed=3
        correlate_folder: correlate --all=score --out=NAME
        """,
        needs=("analyze", "substitute", "ablate", "score"),
    ),
    Step(
        "plan",
        """
        plan_finetune: plan --model=llama2-7b --nocompile --layers=10-14
        plan_lora: plan --model=llama2-7b --nocompile --lora_rank=8 --topology=h100:8 --length=2048
        plan_freeze: plan --model=llama2-7b --nocompile --layers=first:8 --mode=freeze --search --topology=v5p:2x2x2
        plan_analyze: plan --model=llama2-7b --nocompile --job=analyze --topology=v5e:2x4 --mesh=fsdp=8
        plan_substitute: plan --model=export --nocompile --job=substitute --length=128 --window=3 --dtype=float32
        plan_generate: plan --model=llama2-7b --nocompile --job=generate --max_new_tokens=128
        plan_too_large: plan --model=llama2-7b --nocompile --optimizer=adamw --topology=h100:1
        """,
        needs=("export",),
        timed=False,
    ),
    Step(
        "backdoor",
        """
        backdoor: {POISON} --arms=critical:2,random:2 --steps=3 --eval_every=3 --out=NAME
        """,
    ),
    Step(
        "mistakes",
        """
        no_command:
        version: --version
        unknown_command: analyse
        unknown_flag: select --score=analyze/scores.json
        no_scores: select
        no_key: select --scores=analyze/scores.json --criterion=delta_debias
        bad_choice: analyze --bias=debaised
        bad_layers: analyze --layers=criticl:3 --out=NAME
        even_window: analyze --window=4 --out=NAME
        no_file: analyze --data=absent.jsonl --out=NAME
        no_answers: substitute --tuned=finetune --data=rows/text.jsonl --out=NAME
        not_a_run: substitute --tuned=analyze --out=NAME
        other_run: analyze --data=demo:choice --limit=24 --window=7 --out=analyze
        nothing_to_export: export --out=NAME
        no_tuned: substitute --out=NAME
        """,
        needs=("analyze", "finetune"),
    ),
    Step(
        "mesh",
        """
        mesh_analyze: analyze --data=demo:choice --limit=12 --mesh=data=2,fsdp=2 --out=NAME
        mesh_finetune: {TRAIN} --layers=3-4 --steps=2 --mesh=data=2,tensor=1,fsdp=2 --out=NAME
        mesh_export: export --run=mesh_finetune --delta_only --out=NAME
        mesh_generate: generate {SMALL} --max_new_tokens=4 --mesh=fsdp=4 --out=NAME
        """,
        devices=4,
    ),
    Step(
        "finetune_stopped",
        """
        finetune_stopped: {LONG} --out=NAME
        export_stopped: export --run=finetune_stopped --delta_only --out=NAME
        """,
        stop=Stop(signal.SIGTERM, "finetune_stopped/metrics.jsonl", 8),
    ),
    Step(
        "finetune_killed",
        """
        finetune_killed: {LONG} --out=NAME
        export_killed: export --run=finetune_killed --delta_only --out=NAME
        """,
        stop=Stop(signal.SIGKILL, "finetune_killed/metrics.jsonl", 16),
    ),
    Step(
        "substitute_stopped",
        """
        substitute_stopped: substitute --tuned=finetune {TEST} --batch_size=1 --window=3 --out=NAME
        """,
        needs=("finetune",),
        stop=Stop(signal.SIGTERM),
    ),
    Step(
        "ablate_killed",
        """
        ablate_killed: ablate {TEST} --batch_size=2 --methods=skip --out=NAME
        """,
        stop=Stop(signal.SIGKILL),
    ),
    Step(
        "generate_stopped",
        """
        generate_stopped: generate {TEST} --batch_size=1 --max_new_tokens=8 --out=NAME
        """,
        stop=Stop(signal.SIGTERM, "generate_stopped/generations.jsonl.part", 3),
    ),
    Step(
        "two",
        """
        two_analyze: analyze --data=demo:choice --limit=16 --out=NAME
        two_finetune: {TRAIN} --layers=3-4 --steps=2 --out=NAME
        two_substitute: substitute --tuned=two_finetune {TEST} --window=13 --out=NAME
        two_generate: generate --model=two_finetune {SMALL} --max_new_tokens=3 --out=NAME
        two_export: export --run=two_finetune --delta_only --out=NAME
        """,
        processes=2,
    ),
    Step(
        "bucket",
        """
        bucket_analyze: analyze --data=demo:choice --limit=12 --out=gs://bucket/NAME
        bucket_finetune: {TRAIN} --layers=3-4 --steps=2 --out=gs://bucket/NAME
        bucket_generate: generate --model=gs://bucket/bucket_finetune {SMALL} --max_new_tokens=3
            --out=gs://bucket/NAME
        bucket_export: export --run=gs://bucket/bucket_finetune --delta_only --out=NAME
        """,
        bucket=True,
    ),
    Step(
        "backdoor_arms",
        """
        backdoor_arms: {POISON} --arms=full,critical:2,noncritical:2,random:2*2 --steps=4 --eval_every=2 --out=NAME
        """,
        full=True,
    ),
    Step(
        "two_stopped",
        """
        two_stopped: {LONG} --out=NAME
        export_two: export --run=two_stopped --delta_only --out=NAME
        """,
        devices=2,
        processes=2,
        stop=Stop(signal.SIGTERM, "two_stopped/metrics.jsonl", 8),
        full=True,
    ),
    Step(
        "backdoor_defence",
        """
        backdoor_defence: --quick --steps=20 --train_rows=60 --eval_prompts=12 --max_new_tokens=8 --out=NAME
        """,
        script="experiments/backdoor_defence.py",
        full=True,
    ),
    Step(
        "representation_dynamics",
        """
        representation_dynamics: --limit=24 --out=NAME
        """,
        script="experiments/representation_dynamics.py",
        full=True,
    ),
    Step(
        "spectral_dynamics",
        """
        spectral_dynamics: --limit=24 --out=NAME
        """,
        script="experiments/spectral_dynamics.py",
        full=True,
    ),
    Step(
        "pc_removal",
        """
        pc_removal: --data=demo:choice --limit=8 --layers=2-4 --max_new_tokens=6 --out=NAME
        """,
        script="experiments/pc_removal.py",
        full=True,
    ),
    Step(
        "criticality_correlation",
        """
        criticality_correlation: --families=order --steps=6 --rows=64 --tests=12 --out=NAME
        """,
        script="experiments/criticality_correlation.py",
        full=True,
    ),
    Step(
        "domain_adaptation",
        """
        domain_adaptation: --seeds=1 --steps=4 --rows=80 --count=2 --out=NAME
        """,
        script="experiments/domain_adaptation.py",
        full=True,
    ),
)
