// Resolves credentials through the default chain and prints one line of JSON; then again for every line that comes in, by a
// new session, or with the argument `keep` by the same one.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/aws/aws-sdk-go/aws"
	"github.com/aws/aws-sdk-go/aws/credentials"
	"github.com/aws/aws-sdk-go/aws/session"
)

var (
	keep = slices.Contains(os.Args, "keep")
	kept *credentials.Credentials
)

func main() {
	lines := bufio.NewScanner(os.Stdin)
	for again := true; again; again = lines.Scan() {
		line := map[string]any{"version": aws.SDKName + " " + aws.SDKVersion}
		began := time.Now()
		if err := resolve(line); err != nil {
			line["error"] = err.Error()
		}
		line["ms"] = time.Since(began).Milliseconds()
		text, _ := json.Marshal(line)
		fmt.Println(string(text))
	}
}

func resolve(line map[string]any) error {
	if kept == nil || !keep {
		s, err := session.NewSession()
		if err != nil {
			return err
		}
		kept = s.Config.Credentials
	}
	found, err := kept.Get()
	if err != nil {
		return err
	}
	line["access_key_id"] = found.AccessKeyID
	line["source"] = found.ProviderName
	if at, err := kept.ExpiresAt(); err == nil {
		line["expires"] = at.UTC().Format(time.RFC3339)
	}
	return nil
}
