// A reverse proxy of Go's standard library: what a compiled language with its own scheduler costs.
package main

import (
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
)

func main() {
	backend := &url.URL{Scheme: "http", Host: "127.0.0.1:" + os.Args[2]}
	proxy := httputil.NewSingleHostReverseProxy(backend)
	proxy.FlushInterval = -1 // each event at once
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Args[1], proxy))
}
