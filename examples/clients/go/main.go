//go:build generated

// Command go prints the finished report of a submission. Its arguments are the site and the submission's ID.
package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/caddy-fsbroker/caddy-fsbroker/examples/clients/go/api"
)

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	response, err := await(ctx, os.Args[1], os.Getenv("FSBROKER_SECRET"), os.Args[2])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Printf("%s\n", response.Body)
}

// await returns the response with the finished report.
func await(ctx context.Context, site, secret, submitID string) (*api.GetTaskResponse, error) {
	authenticate := func(_ context.Context, r *http.Request) error {
		r.Header.Set("Authorization", "Bearer "+secret)
		return nil
	}
	client, err := api.NewClientWithResponses(site, api.WithRequestEditorFn(authenticate))
	if err != nil {
		return nil, err
	}
	wait := 30
	for {
		response, err := client.GetTaskWithResponse(ctx, &api.GetTaskParams{SubmitID: &submitID, Wait: &wait})
		if err != nil {
			return nil, err
		}
		retryAfter := response.HTTPResponse.Header.Get("Retry-After")
		if retryAfter == "" {
			if response.StatusCode() != http.StatusOK {
				return nil, fmt.Errorf("%s: %s", response.Status(), response.Body)
			}
			return response, nil
		}
		seconds, err := strconv.Atoi(retryAfter)
		if err != nil {
			return nil, err
		}
		select {
		case <-time.After(time.Duration(seconds) * time.Second):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
