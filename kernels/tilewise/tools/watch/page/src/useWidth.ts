// How wide is there room for a figure? Asked again whenever the window changes.

import { useEffect, useRef, useState } from "preact/hooks";
import type { RefObject } from "preact";

export function useWidth(first: number): [RefObject<HTMLDivElement | null>, number] {
  const box = useRef<HTMLDivElement>(null);
  const [width, setWidth] = useState(first);
  useEffect(() => {
    const watcher = new ResizeObserver(([entry]) => {
      if (entry) setWidth(Math.floor(entry.contentRect.width));
    });
    watcher.observe(box.current!);
    return () => watcher.disconnect();
  }, []);
  return [box, width];
}
