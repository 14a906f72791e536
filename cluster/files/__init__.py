"""OpenAI's files and batches: what clients upload and get back, the batches over it, and what runs them.

All state lies in one folder (`serve.files`), so that any front may be asked and a server that died goes on:

    files/file-ID/     content, object.json, used-BATCH for each batch that reads it
    batches/batch_ID/  order.json, state.json, cancel.json, results.jsonl while it runs
    new/               what is being uploaded or removed
    lock, runner       held for a change that touches both, and by the process that runs batches

An order is written once, by a front; `cancel.json` by a front; the state by the runner alone. Every file comes to be
in one step, by a rename.
"""
