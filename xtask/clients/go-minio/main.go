// Resolves credentials as minio-go's IAM provider does, which is no AWS code, and prints one line of JSON; then again for
// every line that comes in, by a new provider.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"runtime/debug"
	"time"

	"github.com/minio/minio-go/v7/pkg/credentials"
)

func main() {
	lines := bufio.NewScanner(os.Stdin)
	for again := true; again; again = lines.Scan() {
		line := map[string]any{"version": version()}
		began := time.Now()
		found, err := credentials.NewIAM("").Get()
		line["ms"] = time.Since(began).Milliseconds()
		if err != nil {
			line["error"] = err.Error()
		} else {
			line["access_key_id"] = found.AccessKeyID
			line["expires"] = found.Expiration.UTC().Format(time.RFC3339)
			line["source"] = "IAM"
		}
		text, _ := json.Marshal(line)
		fmt.Println(string(text))
	}
}

// The version that this program was built with.
func version() string {
	info, _ := debug.ReadBuildInfo()
	for _, module := range info.Deps {
		if module.Path == "github.com/minio/minio-go/v7" {
			return "minio-go " + module.Version
		}
	}
	return "minio-go"
}
