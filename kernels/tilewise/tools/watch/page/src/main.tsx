import { render } from "preact";
import { App } from "./App";
import "./page.css";
import "./figures.css";
import "./dock.css";

render(<App />, document.getElementById("page")!);
