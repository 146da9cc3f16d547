// A tab for each pass that was recorded, and one to compare.

import type { JSX } from "preact";
import { useRef } from "preact/hooks";
import { open, tab, tabs, type Tab } from "./app_state";
import { switchTheme, theme } from "./colour";
import { Keys } from "./Header";
import { recording } from "./recording";

function titleOf(name: Tab): string {
  return recording.passes.find((each) => each.name === name)?.title ?? "Compare";
}

export function Tabs(): JSX.Element {
  const list = useRef<HTMLDivElement>(null);
  const move = (event: KeyboardEvent): void => {
    const step = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
    if (step === 0) return;
    event.preventDefault();
    event.stopPropagation();
    const next = (tabs.indexOf(tab.value) + step + tabs.length) % tabs.length;
    open(tabs[next]!);
    list.current!.querySelectorAll<HTMLElement>("[role=tab]")[next]!.focus();
  };
  return (
    <div class="bar">
      <nav class="tabs" aria-label="Passes">
        <div role="tablist" aria-label="Passes" ref={list} onKeyDown={move}>
          {tabs.map((name) => (
            <button
              key={name}
              type="button"
              role="tab"
              id={`tab-${name}`}
              aria-selected={name === tab.value}
              aria-controls="panel"
              tabIndex={name === tab.value ? 0 : -1}
              onClick={() => open(name)}
            >
              {titleOf(name)}
            </button>
          ))}
        </div>
      </nav>
      <Keys />
      <button
        type="button"
        class="theme"
        onClick={switchTheme}
        aria-label={`Switch to ${theme.value === "dark" ? "light" : "dark"} colours`}
      >
        {theme.value === "dark" ? "Light" : "Dark"}
      </button>
    </div>
  );
}
