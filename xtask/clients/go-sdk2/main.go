// Resolves credentials through the default configuration and prints one line of JSON; then again for every line that comes
// in, by a new configuration, or with the argument `keep` by the same one.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
)

var (
	keep = slices.Contains(os.Args, "keep")
	kept aws.CredentialsProvider
)

func main() {
	lines := bufio.NewScanner(os.Stdin)
	for again := true; again; again = lines.Scan() {
		line := map[string]any{"version": aws.SDKName + " " + aws.SDKVersion}
		began := time.Now()
		if err := resolve(context.Background(), line); err != nil {
			line["error"] = err.Error()
		}
		line["ms"] = time.Since(began).Milliseconds()
		text, _ := json.Marshal(line)
		fmt.Println(string(text))
	}
}

func resolve(ctx context.Context, line map[string]any) error {
	if kept == nil || !keep {
		loaded, err := config.LoadDefaultConfig(ctx)
		if err != nil {
			return err
		}
		kept = loaded.Credentials
	}
	found, err := kept.Retrieve(ctx)
	if err != nil {
		return err
	}
	line["access_key_id"] = found.AccessKeyID
	line["source"] = found.Source
	if found.CanExpire {
		line["expires"] = found.Expires.UTC().Format(time.RFC3339)
	}
	return nil
}
