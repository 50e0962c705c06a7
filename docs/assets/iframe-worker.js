// A page that is opened from a folder may not start a worker, so the search runs in a hidden frame of the page instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const worker = frame.contentWindow
      this.worker = worker
      this.waiting = []
      // What the worker posts goes to the page, and what the page posts to the worker.
      worker.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      worker.importScripts = (...urls) => urls.reduce((before, url) => before.then(() => load(url)), Promise.resolve())
      const load = source => new Promise((resolve, reject) => {
        const script = worker.document.createElement("script")
        script.src = source
        script.onload = resolve
        script.onerror = reject
        worker.document.head.append(script)
      })
      load(new URL(url, location.href).href).then(() => {
        this.waiting.forEach(data => this.deliver(data))
        this.waiting = null
      })
    }
    postMessage(data) {
      if (this.waiting) this.waiting.push(data)
      else this.deliver(data)
    }
    deliver(data) {
      this.worker.dispatchEvent(new this.worker.MessageEvent("message", { data }))
    }
  }
}
