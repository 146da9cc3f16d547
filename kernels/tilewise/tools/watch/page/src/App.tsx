// The page.

import type { JSX } from "preact";
import { pass as passSignal, spoken, tab } from "./app_state";
import { Compare } from "./compare/Compare";
import { Dock } from "./Dock";
import { Header } from "./Header";
import { ScoreMap } from "./Map";
import { Now } from "./Now";
import { Source } from "./Source";
import { Step } from "./Step";
import { Tabs } from "./Tabs";
import { TimelineFigure } from "./TimelineFigure";

export function App(): JSX.Element {
  const pass = passSignal.value;
  return (
    <>
      <Header />
      <Tabs />
      <main>
        <div id="panel" role="tabpanel" aria-labelledby={`tab-${tab.value}`}>
          {pass ? (
            <>
              <Now />
              {pass.timeline && <TimelineFigure timeline={pass.timeline} />}
              <div class="figures">
                {pass.programs[0]?.walks !== "splits" && <ScoreMap key={`map ${pass.name}`} />}
                <Step key={`step ${pass.name}`} />
              </div>
              <Source />
            </>
          ) : (
            <Compare />
          )}
        </div>
      </main>
      <p class="spoken" aria-live="polite">
        {spoken}
      </p>
      <Dock />
    </>
  );
}
