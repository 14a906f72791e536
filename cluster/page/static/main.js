// Begins both halves of the page; on narrow screens one of them shows at a time.
import { Chat } from "./chat.js";
import { Cluster } from "./cluster.js";
import { byId } from "./elements.js";

function show(view) {
  document.body.dataset.view = view;
  for (const each of ["chat", "cluster"]) byId(`show-${each}`).setAttribute("aria-pressed", String(each === view));
}

for (const view of ["chat", "cluster"]) byId(`show-${view}`).addEventListener("click", () => show(view));
show("chat");
new Chat().start();
new Cluster().run();
