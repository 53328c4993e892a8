// Opens a panel of ipywidgets to keyboards and screen readers. JupyterLab runs it in the page; `element` is its own output.
// What it mends: sliders without a name that speak the position of an option instead of the option; radio buttons that
// are no group; and JupyterLab, which takes the arrow keys from drop-downs and radio buttons to move between cells.
(function (place) {
  function set(node, name, value) {
    if (node && node.getAttribute(name) !== value) node.setAttribute(name, value);
  }

  function mend(panel) {
    for (const control of panel.querySelectorAll("select, input, button, [tabindex]")) {
      set(control, "data-lm-suppress-shortcuts", "true");
    }
    for (const slider of panel.querySelectorAll(".widget-slider")) {
      const handle = slider.querySelector("[role=slider]");
      const readout = slider.querySelector(".widget-readout");
      set(handle, "aria-label", slider.querySelector(".widget-label").textContent);
      set(handle, "aria-valuetext", readout.textContent);
      set(readout, "contenteditable", "false");
    }
    panel.querySelectorAll(".labkit-question").forEach(function (question, number) {
      const choice = question.querySelector(".labkit-choice");
      const radios = choice.querySelectorAll("input[type=radio]");
      set(choice, "role", radios.length ? "radiogroup" : "group");
      set(choice, "aria-label", question.querySelector("p").textContent);
      for (const radio of radios) set(radio, "name", panel.dataset.labkit + "-" + number);
    });
  }

  function start(tries) {
    const panel = place.isConnected && place.closest(".labkit-panel");
    if (!panel) {
      if (tries) setTimeout(start, 100, tries - 1);
      return;
    }
    panel.dataset.labkit = "panel-" + Math.random().toString(36).slice(2);
    mend(panel);
    const changes = { subtree: true, childList: true, characterData: true, attributes: true, attributeFilter: ["aria-valuetext"] };
    new MutationObserver(function () { mend(panel); }).observe(panel, changes);
  }

  start(100);
})(element);
